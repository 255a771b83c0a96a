"""Learning curves and leverage ratios of a run, shaped for the figures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tell_core.report.figures import Level, LeveragePoint, Point, Reach, Series
from tell_core.report.formats import as_number, format_ratio, leverage_bound
from tell_core.report.palette import style_of
from tell_core.report.reading import Json, RunFiles
from tell_core.spec.arms import SFT_ARMS

BASELINES = (*SFT_ARMS, "best")
NO_LEVERAGE = (
    "No leverage was analysed in this run (leverage.json is missing): the analysis needs the arms "
    "sft and tell at shared task budgets."
)
_PRICE_METRICS = frozenset({"general_log_probability", "retention_log_probability"})


@dataclass(frozen=True)
class CurvePoint:
    """One arm at one task budget and general budget: mean over seeds, interval, every seed.

    Attributes:
        arm: Name of the arm.
        task_budget_tokens: None when the arm uses no task data.
        general_budget_tokens: None when the arm depends on no general data.
        task_tokens: Task tokens really used, on average over seeds.
        mean: Mean score over seeds.
        low: Lower end of the interval, None when there is none.
        high: Upper end likewise.
        seeds: Score of each seed.
    """

    arm: str
    task_budget_tokens: int | None
    general_budget_tokens: int | None
    task_tokens: float | None
    mean: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


def primary_metric(run: RunFiles) -> str:
    """Return the metric of the headline answer."""
    if run.leverage and run.leverage.get("primary_metric"):
        return str(run.leverage["primary_metric"])
    return str((run.spec.get("analysis") or {}).get("primary_metric", "log_probability"))


def metrics(run: RunFiles) -> tuple[str, ...]:
    """Return every metric of the run, the primary one first."""
    known = list((run.leverage or {}).get("metrics") or {})
    known += [str(row["metric"]) for row in run.results]
    first = primary_metric(run)
    rest = [name for name in dict.fromkeys(known) if name != first]
    return (first, *rest) if first in known else tuple(rest)


def is_price_metric(metric: str) -> bool:
    """Whether a metric looks at what the model could do before, not at the task's test items."""
    return metric in _PRICE_METRICS or metric.startswith("harness/")


def test_metrics(run: RunFiles) -> tuple[str, ...]:
    """Return the metrics on the task's test items, the primary one first."""
    return tuple(metric for metric in metrics(run) if not is_price_metric(metric))


def is_higher_better(run: RunFiles, metric: str) -> bool:
    """Return the direction of a metric; higher is better unless the analysis says otherwise."""
    entry = ((run.leverage or {}).get("metrics") or {}).get(metric) or {}
    return entry.get("higher_is_better") is not False


def in_order(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    """Sort points by arm as in legends, then by general and task budget."""
    return sorted(
        points,
        key=lambda p: (arm_place(p.arm), p.general_budget_tokens or 0, p.task_budget_tokens or 0),
    )


def curve_points(run: RunFiles, metric: str) -> tuple[CurvePoint, ...]:
    """Return the curves of a metric from ``leverage.json``; without it, plain means of results."""
    analysed = ((run.leverage or {}).get("metrics") or {}).get(metric) or {}
    if analysed.get("curves"):
        points = [_from_curve(curve) for curve in analysed["curves"]]
        return tuple(point for point in points if point is not None)
    return _from_results(row for row in run.results if row["metric"] == metric)


def general_budgets(points: Iterable[CurvePoint]) -> tuple[int, ...]:
    """Return the general budgets of arms trained on task and general data, rising."""
    found = {
        point.general_budget_tokens for point in points if point.general_budget_tokens is not None
    }
    return tuple(sorted(found))


def at_general_budget(points: Iterable[CurvePoint], budget: int | None) -> list[CurvePoint]:
    """Keep the points of one general budget and those that depend on none."""
    return [point for point in points if point.general_budget_tokens in (None, budget)]


def as_series(points: Iterable[CurvePoint]) -> list[Series]:
    """Group points with a task budget by arm, in the order of the legends."""
    groups: dict[str, list[CurvePoint]] = defaultdict(list)
    for point in points:
        if point.task_tokens:
            groups[point.arm].append(point)
    return [
        Series(arm, arm_label(arm), tuple(_as_points(groups[arm])))
        for arm in sorted(groups, key=arm_place)
    ]


def as_levels(points: Iterable[CurvePoint]) -> list[Level]:
    """Return the arms without task data as horizontal lines."""
    flat = [point for point in points if not point.task_tokens]
    flat.sort(key=lambda point: arm_place(point.arm))
    return [Level(p.arm, arm_label(p.arm), p.mean, p.low, p.high) for p in flat]


def arm_place(arm: str) -> tuple[int, str]:
    """Sort key of arms in legends and tables."""
    return (style_of(arm).place, arm)


def arm_label(arm: str) -> str:
    """Return how an arm is written in figures: TELL and SFT in capitals."""
    label = arm.replace("_", " ")
    for word in ("tell", "sft"):
        if label.split(" ")[0].split("(")[0] == word:
            return word.upper() + label[len(word) :]
    return label


def leverage_rows(run: RunFiles, metric: str) -> dict[str, dict[str, list[Json]]]:
    """Return leverage entries as arm -> general budget -> rows by rising task budget."""
    analysed = ((run.leverage or {}).get("metrics") or {}).get(metric) or {}
    return {
        arm: {
            budget: sorted(rows, key=lambda row: row["task_budget_tokens"])
            for budget, rows in sorted(by_general.items(), key=lambda item: _budget(item[0]))
        }
        for arm, by_general in sorted(
            (analysed.get("arms") or {}).items(), key=lambda item: arm_place(item[0])
        )
    }


def against(rows: Sequence[Json], baseline: str) -> list[Json]:
    """Keep the leverage entries against one baseline."""
    return [row for row in rows if row.get("baseline") == baseline]


def headline_rows(run: RunFiles) -> list[Json]:
    """Return the leverage entries of TELL at its largest general budget against the best SFT."""
    by_general = leverage_rows(run, primary_metric(run)).get("tell") or {}
    budget = headline_general_budget(run)
    rows = by_general.get(str(budget)) or next(reversed(by_general.values()), [])
    return against(rows, "best")


def headline_general_budget(run: RunFiles) -> int | None:
    """Return the largest general budget at which TELL was run, or None."""
    budgets = [
        cell.general_budget_tokens
        for cell in run.cells_of("tell")
        if cell.general_budget_tokens is not None
    ]
    return max(budgets, default=None)


def leverage_points(rows: Iterable[Json]) -> list[LeveragePoint]:
    """Turn leverage entries into points to draw; undefined ones are left out."""
    points = []
    for row in rows:
        bound = leverage_bound(row)
        ratio = as_number(row.get("ratio")) if row.get("censored") == "none" else bound
        if ratio is not None and ratio > 0:
            ends = (as_number(row.get("low")), as_number(row.get("high")))
            kind = "" if bound is None else str(row["censored"])
            points.append(LeveragePoint(row["task_budget_tokens"], ratio, *ends, kind))
    return points


def lead_row(run: RunFiles) -> Json | None:
    """Return the headline's entry with the largest leverage shown to be above 1, or None."""
    shown = [row for row in headline_rows(run) if (as_number(row.get("low")) or 0.0) > 1]
    return max(shown, key=_size, default=None)


def headline_reach(run: RunFiles, points: Sequence[CurvePoint]) -> Reach | None:
    """Return the arrow of the lead entry, from TELL to the task tokens SFT needs."""
    row = lead_row(run)
    if row is None or not _size(row):
        return None
    place = ("tell", row["task_budget_tokens"])
    start = next((p for p in points if (p.arm, p.task_budget_tokens) == place), None)
    if start is None or not start.task_tokens:
        return None
    is_bound = row.get("censored") == "above"
    label = f"{'≥ ' if is_bound else ''}{format_ratio(_size(row))}×"
    end = as_number(row.get("sft_equivalent_tokens")) or start.task_tokens * _size(row)
    return Reach(start.task_tokens, end, start.mean, label, is_bound)


def _size(row: Json) -> float:
    return as_number(row.get("ratio")) or leverage_bound(row) or 0.0


def _from_curve(curve: Mapping[str, Any]) -> CurvePoint | None:
    mean = as_number(curve.get("mean"))
    if mean is None:
        return None
    tokens = as_number(curve.get("task_tokens")) or as_number(curve.get("task_budget_tokens"))
    scores = [as_number(seed.get("score")) for seed in curve.get("seeds") or ()]
    return CurvePoint(
        arm=str(curve["arm"]),
        task_budget_tokens=curve.get("task_budget_tokens"),
        general_budget_tokens=curve.get("general_budget_tokens"),
        task_tokens=tokens if curve.get("task_budget_tokens") is not None else None,
        mean=mean,
        low=as_number(curve.get("low")),
        high=as_number(curve.get("high")),
        seeds=tuple(score for score in scores if score is not None),
    )


def _from_results(rows: Iterable[Json]) -> tuple[CurvePoint, ...]:
    groups: dict[tuple[Any, ...], list[Json]] = defaultdict(list)
    for row in rows:
        if as_number(row.get("score")) is not None:
            key = (row["arm"], row["task_budget_tokens"], row["general_budget_tokens"])
            groups[key].append(row)
    return tuple(_mean_of(*key, rows=group) for key, group in groups.items())


def _mean_of(arm: str, task: int | None, general: int | None, *, rows: list[Json]) -> CurvePoint:
    scores = tuple(float(row["score"]) for row in rows)
    used = [row.get("task_tokens") or task or 0 for row in rows]
    tokens = fmean(used) if task is not None else None
    return CurvePoint(arm, task, general, tokens, fmean(scores), None, None, scores)


def _as_points(points: Iterable[CurvePoint]) -> list[Point]:
    ordered = sorted(points, key=lambda point: point.task_tokens or 0.0)
    return [Point(p.task_tokens or 0.0, p.mean, p.low, p.high, p.seeds) for p in ordered]


def _budget(name: str) -> float:
    return float(name) if name.isdigit() else 0.0
