"""The analysis of a run: leverage, forecast, emergence, and the answer in plain words."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tell_core.analysis.cells import AnalysedCell, ItemStatistics, Progress
from tell_core.analysis.curves import CurvePoint, curve_row
from tell_core.analysis.emergence import MIN_POINTS, REMARK, emergence_summary
from tell_core.analysis.forecast import HORIZON_FACTOR, forecast_metric
from tell_core.analysis.leverage import crossing, leverage_ratio
from tell_core.analysis.multiple import holm
from tell_core.analysis.power import measured_power
from tell_core.analysis.price import price_rows
from tell_core.analysis.resampling import Resampling
from tell_core.analysis.traces import trace_cell
from tell_core.analysis.variance import variance_row
from tell_core.analysis.words import ARM_WORDS, count, metric_words, number, rounded, short
from tell_core.evaluation.base import Metric
from tell_core.evaluation.metrics import build_metrics
from tell_core.spec.arms import SFT_ARMS, parse_arm
from tell_core.spec.model import AnalysisSpec, ExperimentSpec
from tell_core.store import write_json

LEVERAGE_FILE = "leverage.json"
FORECAST_FILE = "forecast.json"
EMERGENCE_FILE = "emergence.json"
BEST = "best"

Entry = Mapping[str, Any]
Points = Mapping[str, Sequence[CurvePoint]]


def analyse_run(
    cells: Iterable[Mapping[str, Any]],
    spec: ExperimentSpec,
    out: Path,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Read predictions and probe losses of all cells; write leverage, forecast and emergence.

    Args:
        cells: What `CellOutcome.record` gives for each finished cell.
        spec: The experiment, for its metrics and its statistics.
        out: The run directory.
        on_progress: Called with "reading predictions", "leverage", "forecast" or "emergence",
            what is done and how much there is.

    Returns:
        The content of leverage.json.

    Raises:
        AnalysisError: A file is missing or damaged, or cells were scored on different items.
    """
    analysed = [AnalysedCell.from_record(record) for record in cells]
    statistics = ItemStatistics(analysed, build_metrics(spec.evaluation), on_progress)
    resampling = Resampling.of(spec.analysis)
    points = {metric.name: statistics.points(metric, resampling) for metric in statistics.metrics}
    leverage = leverage_of_run(statistics, points, spec.analysis, on_progress)
    write_json(out / LEVERAGE_FILE, leverage)
    forecast = forecast_of_run(statistics.metrics, points, spec.analysis, on_progress)
    write_json(out / FORECAST_FILE, forecast)
    write_json(out / EMERGENCE_FILE, emergence_of_run(analysed, on_progress))
    return leverage


def leverage_of_run(
    statistics: ItemStatistics,
    points: Points,
    analysis: AnalysisSpec,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The content of leverage.json, from the points of each metric."""
    resampling = Resampling.of(analysis)
    metrics: dict[str, Any] = {}
    price: list[dict[str, Any]] = []
    for done, metric in enumerate(statistics.metrics, start=1):
        found = points[metric.name]
        repeats = [statistics.repeats(metric, point) for point in found]
        metrics[metric.name] = _metric_entry(metric, found, repeats, resampling)
        price += price_rows(metric, found, resampling) if metric.items != "test" else []
        if on_progress:
            on_progress("leverage", done, len(statistics.metrics))
    arms = {point.arm for found in points.values() for point in found}
    baselines = [arm for arm in SFT_ARMS if arm in arms]
    return {
        "primary_metric": analysis.primary_metric,
        "confidence": analysis.confidence,
        "bootstrap_draws": analysis.bootstrap_draws,
        "baselines": [*baselines, *([BEST] * bool(baselines))],
        "metrics": metrics,
        "price": price,
    }


def forecast_of_run(
    metrics: Sequence[Metric],
    points: Points,
    analysis: AnalysisSpec,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The content of forecast.json: of every metric on test items."""
    tested = [metric for metric in metrics if metric.items == "test"]
    found = {}
    for done, metric in enumerate(tested, start=1):
        found[metric.name] = forecast_metric(metric, points[metric.name], analysis)
        if on_progress:
            on_progress("forecast", done, len(tested))
    return {
        "confidence": analysis.forecast_confidence,
        "horizon_factor": HORIZON_FACTOR,
        "primary_metric": analysis.primary_metric,
        "metrics": found,
    }


def leverage_by_arm(
    metric: Metric, points: Sequence[CurvePoint], resampling: Resampling
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """``arms`` of a metric in leverage.json: rows by TELL arm and general budget.

    Every TELL point is compared with each SFT arm and with the better of them; p-values are
    corrected over all rows of the same baseline.
    """
    arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
    told = [point for point in points if parse_arm(point.arm).is_tell]
    for point in sorted(told, key=_budgets):
        curves = _baseline_curves(points, point.general_budget_tokens)
        rows = arms.setdefault(point.arm, {}).setdefault(str(point.general_budget_tokens), [])
        for name, chosen in _comparisons(curves).items():
            estimate = leverage_ratio(
                point, chosen, resampling, higher_is_better=metric.higher_is_better
            )
            budget = {"task_budget_tokens": point.task_budget_tokens, "baseline": name}
            rows.append(budget | estimate.as_json())
    _correct(arms)
    return arms


def emergence_of_run(
    cells: Sequence[AnalysedCell], on_progress: Progress | None = None
) -> dict[str, Any]:
    """The content of emergence.json."""
    traced = {}
    for done, cell in enumerate(cells, start=1):
        if entry := trace_cell(cell):
            traced[cell.name] = entry
        if on_progress:
            on_progress("emergence", done, len(cells))
    pairs = [(cell.arm, traced[cell.name]) for cell in cells if cell.name in traced]
    return {
        "min_points": MIN_POINTS,
        "remark": REMARK,
        "cells": traced,
        "by_arm": emergence_summary(pairs),
    }


def verdict_sentence(leverage: Mapping[str, Any]) -> list[str]:
    """The answer of leverage.json in plain words, a sentence for each task budget.

    It is about arm `tell` and the primary metric, against the best SFT. Nothing is claimed where
    the interval includes 1, or where there is none.
    """
    metric = leverage["primary_metric"]
    entry = leverage["metrics"].get(metric, {})
    by_general = entry.get("arms", {}).get("tell", {})
    if not any(by_general.values()):
        return [_nothing_to_say(leverage, entry, metric)]
    baseline = baseline_words(leverage["baselines"])
    sentences = []
    for budget, rows in by_general.items():
        best = [row for row in rows if row["baseline"] == BEST]
        if len(by_general) > 1:
            sentences.append(f"General budget {count(int(budget))} tokens:")
        sentences += [_sentence(row, metric, baseline) for row in best]
        sentences.append(" ".join([_crossing_sentence(best), *_holm_sentence(best)]))
    return sentences


def _holm_sentence(rows: Sequence[Entry]) -> list[str]:
    """At which budgets the difference of scores stands when all comparisons are allowed for."""
    tested = [row for row in rows if row.get("p_holm") is not None]
    if len(tested) < 2:
        return []
    alpha = 1 - tested[0]["confidence"]
    held = [
        count(row["task_budget_tokens"])
        for row in tested
        if row["p_holm"] <= alpha and row["advantage"]["difference"] > 0
    ]
    where = f"at {', '.join(held)} task tokens" if held else "at none of them"
    return [
        f"Each interval stands for its budget alone; allowing for all {len(tested)} comparisons"
        f" (Holm), TELL's score is shown to be higher {where}."
    ]


def _metric_entry(
    metric: Metric,
    points: Sequence[CurvePoint],
    repeats: Sequence[Sequence[Sequence[float]]],
    resampling: Resampling,
) -> dict[str, Any]:
    """One entry of ``metrics``. Leverage is a matter of the task: test items only."""
    arms = leverage_by_arm(metric, points, resampling) if metric.items == "test" else {}
    return {
        "higher_is_better": metric.higher_is_better,
        "arms": arms,
        "crossings": {
            arm: {budget: _crossings(rows) for budget, rows in by_general.items()}
            for arm, by_general in arms.items()
        },
        "curves": [curve_row(point, resampling, metric.limits) for point in points],
        "variance": [
            variance_row(point, scores, is_generated=metric.needs_generation)
            for point, scores in zip(points, repeats, strict=True)
        ],
        "power": measured_power(
            points, resampling.confidence, higher_is_better=metric.higher_is_better
        ),
    }


def _correct(arms: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> None:
    """Add Holm's correction over all rows of the same baseline."""
    rows = [row for by_general in arms.values() for found in by_general.values() for row in found]
    for baseline in dict.fromkeys(row["baseline"] for row in rows):
        same = [row for row in rows if row["baseline"] == baseline]
        for row, corrected in zip(same, holm([row["p_value"] for row in same]), strict=True):
            row["p_holm"] = corrected


def _budgets(point: CurvePoint) -> tuple[int, int]:
    return point.general_budget_tokens or 0, point.task_budget_tokens or 0


def _baseline_curves(
    points: Sequence[CurvePoint], general_budget: int | None
) -> dict[str, list[CurvePoint]]:
    """Points of the SFT arms; `sft_matched` has the steps of `tell` at a general budget."""
    curves: dict[str, list[CurvePoint]] = {}
    for arm in SFT_ARMS:
        fitting = [
            point
            for point in points
            if point.arm == arm and point.general_budget_tokens in (None, general_budget)
        ]
        if fitting:
            curves[arm] = fitting
    return curves


def _comparisons(curves: Mapping[str, list[CurvePoint]]) -> dict[str, list[list[CurvePoint]]]:
    """Each baseline alone, then the best of all there are."""
    alone = {arm: [curve] for arm, curve in curves.items()}
    return {**alone, BEST: list(curves.values())} if curves else {}


def _crossings(rows: Sequence[Entry]) -> dict[str, dict[str, int | None]]:
    names = dict.fromkeys(row["baseline"] for row in rows)
    return {name: crossing(row for row in rows if row["baseline"] == name) for name in names}


def _nothing_to_say(leverage: Mapping[str, Any], entry: Entry, metric: str) -> str:
    if not entry:
        known = ", ".join(leverage["metrics"]) or "none"
        return f"Leverage is undefined: no cell has the primary metric {metric!r} (there: {known})."
    missing = "sft" if not leverage["baselines"] else "tell"
    return f"Leverage is undefined: it compares arms tell and sft, and {missing} was not run."


def baseline_words(baselines: Sequence[str]) -> str:
    """The SFT arms of a run as one baseline, in words."""
    named = [ARM_WORDS[name] for name in baselines if name in SFT_ARMS]
    return f"the better of {' and '.join(named)}" if len(named) > 1 else "".join(named) or "SFT"


def _sentence(row: Entry, metric: str, baseline: str) -> str:
    budget = count(row["task_budget_tokens"])
    if row["censored"] == "undefined":
        return f"With {budget} task tokens leverage is undefined: {row['reason']}{_estimate(row)}."
    score = f"{metric_words(metric)} {number(row['tell_score'])}"
    opening = f"With {budget} task tokens, TELL reaches {score}; {baseline} "
    tokens = count(rounded(row["sft_equivalent_tokens"]))
    if row["censored"] == "above":
        middle = f"does not reach that with up to {tokens}: leverage at least "
    elif row["censored"] == "below":
        middle = f"reaches that with {tokens} already: leverage at most "
    else:
        middle = f"needs about {tokens} task tokens for that: leverage "
    ratio = short(row["ratio"] if row["bound"] is None else row["bound"])
    return f"{opening}{middle}{ratio} ({_interval(row)}).{_judgement(row)}"


def _estimate(row: Entry) -> str:
    return "" if row["ratio"] is None else f" (this seed alone: {short(row['ratio'])})"


def _interval(row: Entry) -> str:
    low, high = row["low"], row["high"]
    level = f"{100 * row['confidence']:g} %: "
    if low is None and high is None:
        return f"{level}unbounded"
    if high is None:
        return f"{level}at least {short(low)}"
    if low is None:
        return f"{level}at most {short(high)}"
    return f"{level}{short(low)} to {short(high)}"


def _judgement(row: Entry) -> str:
    if row["low"] is not None and row["low"] > 1:
        return ""
    if row["high"] is not None and row["high"] < 1:
        return " TELL does not help here."
    return " The interval includes 1: no claim."


def _crossing_sentence(rows: Sequence[Entry]) -> str:
    """Where leverage ends, among the budgets tried."""
    ends = crossing(rows)
    above, below = ends["largest_budget_above_one"], ends["smallest_budget_below_one"]
    if above is None and below is None:
        return "At no task budget is leverage shown to differ from 1."
    shown = f"The largest task budget with leverage shown above 1 is {count(above)} tokens."
    if below is None:
        return shown
    later = [row["high"] for row in rows if row["task_budget_tokens"] >= below]
    is_lasting = all(high is not None and high < 1 for high in later)
    place = f"from {count(below)} task tokens on" if is_lasting else f"at {count(below)}"
    ending = f"Leverage is below 1 {place}: TELL does not help there."
    return ending if above is None else f"{shown} {ending}"
