"""Section on the forecast: what more task data would bring, and how far that can be trusted."""

from collections.abc import Iterable, Sequence
from functools import partial

from scipy.stats import binom

from tell_core.analysis.sentences import forecast_sentences
from tell_core.report.blocks import (
    Block,
    Bullets,
    Chart,
    Entry,
    Fold,
    LegendKey,
    Panels,
    Section,
    Table,
    Text,
    missing,
    shortened,
)
from tell_core.report.charts import legend_of, make_chart
from tell_core.report.curves import (
    CurvePoint,
    arm_label,
    as_series,
    curve_points,
    primary_metric,
)
from tell_core.report.figure_data import forecast_data
from tell_core.report.figures import Point
from tell_core.report.forecast_figure import (
    COVERED_MARKER,
    MISSED_MARKER,
    BackTest,
    ForecastCurve,
    forecast_curve,
)
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_score,
    format_score_interval,
    format_share,
    metric_title,
    plural,
    short_metric_title,
)
from tell_core.report.learning import MAX_PANELS
from tell_core.report.reading import Json, RunFiles

TITLE = "Forecast"
MAX_SENTENCES = 8
_RARE = 0.1  # chance of so few back-tests inside, were the confidence right and they independent


def forecast(run: RunFiles) -> Section:
    """Say what more task tokens would reach, draw it, and state how the forecasts were tested."""
    found: Json = (run.forecast or {}).get("metrics") or {}
    if run.forecast is None or not found:
        return Section("forecast", TITLE, (missing(_NO_FORECAST),))
    primary = primary_metric(run)
    sentences = forecast_sentences(run.forecast, run.leverage or {"metrics": found})
    blocks = _in_words(sentences)
    panels = (_panel(run, primary, curve) for curve in _curves(found, primary))
    if charts := tuple(chart for chart in panels if chart is not None):
        blocks.append(Panels(charts[:MAX_PANELS], _caption(run, run.forecast)))
    names = [name for name in (primary, *found) if name in found]
    blocks.append(_calibration_table({name: found[name] for name in names}))
    blocks.append(Text(_calibration_note(found.get(primary) or {}), "note"))
    blocks += [block for name in dict.fromkeys(names) for block in _tables(found, name)]
    return Section("forecast", TITLE, blocks)


def _in_words(sentences: Sequence[str]) -> list[Block]:
    """Show the first sentences and the last, about calibration; the rest behind a line."""
    if len(sentences) <= MAX_SENTENCES:
        return [Bullets(tuple(sentences))]
    shown = (*sentences[: MAX_SENTENCES - 1], sentences[-1])
    rest = tuple(sentences[MAX_SENTENCES - 1 : -1])
    return [Bullets(shown), Fold("More forecasts in words", (Bullets(rest),))]


def _curves(found: Json, metric: str) -> Sequence[Json]:
    return (found.get(metric) or {}).get("curves") or ()


def _panel(run: RunFiles, metric: str, curve: Json) -> Chart | None:
    drawn = _as_curve(curve_points(run, metric), curve)
    if curve.get("status") != "ok" or not drawn.band:
        return None
    label = short_metric_title(metric)
    name = f"forecast-{metric}-{drawn.arm}-g{curve.get('general_budget_tokens') or 0}"
    keys = legend_of([drawn.arm])
    if drawn.backtests:
        keys += _BACKTEST_KEYS
    return make_chart(
        f"{_curve_title(curve)}: {metric_title(metric)}",
        name,
        partial(forecast_curve, drawn, y_label=label),
        forecast_data(drawn),
        _alternative(drawn),
        legend=keys,
    )


def _as_curve(points: Iterable[CurvePoint], curve: Json) -> ForecastCurve:
    """Put the measured points of an arm beside its forecast."""
    arm, general = str(curve["arm"]), curve.get("general_budget_tokens")
    same = [p for p in points if (p.arm, p.general_budget_tokens) == (arm, general)]
    measured = tuple(point for series in as_series(same) for point in series.points)
    band = tuple(
        Point(row["task_tokens"], row["score"], as_number(row["low"]), as_number(row["high"]))
        for row in curve.get("band") or ()
    )
    tests = tuple(
        BackTest(row["task_tokens"], row["observed"], row["score"], row["low"], row["high"],
                 bool(row["is_covered"]))
        for row in curve.get("backtests") or ()
    )  # fmt: skip
    targets = tuple(
        (str(row["label"]), row["score"])
        for row in curve.get("targets") or ()
        if as_number(row.get("score")) is not None
    )
    return ForecastCurve(arm, measured, band, tests, targets)


def _alternative(curve: ForecastCurve) -> str:
    first, last = curve.band[0], curve.band[-1]
    covered = sum(test.is_covered for test in curve.backtests)
    return (
        f"{arm_label(curve.arm)}: {format_score(first.mean)} at {format_count(first.x)} task "
        f"tokens; forecast for {format_count(last.x)}: {format_score(last.mean)} "
        f"{format_score_interval(last.low, last.high)}. {covered} of "
        f"{plural(len(curve.backtests), 'back-test')} inside the interval."
    )


def _curve_title(curve: Json) -> str:
    general = curve.get("general_budget_tokens")
    where = "" if general is None else f", general budget {format_count(general)}"
    return f"{arm_label(str(curve['arm']))}{where}"


def _caption(run: RunFiles, forecast: Json) -> str:
    confidence = format_share(forecast.get("confidence"))
    measured = format_share((run.leverage or {}).get("confidence"))
    factor = as_number(forecast.get("horizon_factor")) or 4.0
    return (
        f"Filled markers with bars: measured scores, {measured} intervals. Shaded: {confidence} "
        "interval of the forecast, its middle solid where measured and dashed beyond; nothing is"
        f" forecast beyond {factor:g} times the largest measured budget. Thin bars with a diamond"
        " (covered) or a cross (missed), right of a measured score: what smaller budgets forecast"
        " for it. Dotted horizontal lines: the target scores."
    )


def _calibration_note(entry: Json) -> str:
    """Say what back-tests are, and warn where fewer held than the confidence promised."""
    found: Json = entry.get("calibration") or {}
    tests, covered = int(found.get("num_backtests") or 0), int(found.get("num_covered") or 0)
    nominal = as_number(found.get("nominal"))
    is_short = nominal is not None and binom.cdf(covered, tests, nominal) < _RARE
    return f"{_BACKTEST_NOTE} {_TOO_NARROW}" if tests and is_short else _BACKTEST_NOTE


def _tables(found: Json, metric: str) -> list[Block]:
    tables = [
        shortened(table)
        for table in (_targets(metric, found), _gains(metric, found), _backtests(metric, found))
        if table.rows
    ]
    return [Fold(f"Numbers: {metric_title(metric)}", tables)] if tables else []


def _targets(metric: str, found: Json) -> Table:
    columns = ("Arm", "General budget", "Target", "Score", "Task tokens in all", "More than now",
               "Interval of more", "Note")  # fmt: skip
    rows = tuple(
        (
            *_curve_entries(curve),
            Entry(str(target.get("label") or "")),
            Entry(format_score(target.get("score")), value=as_number(target.get("score"))),
            Entry(format_count(target.get("tokens"))),
            Entry(format_count(target.get("more_tokens"))),
            Entry(_more_interval(target)),
            Entry(_STATUSES.get(str(target.get("status")), str(target.get("status"))),
                  remark=str(target.get("reason") or "")),
        )
        for curve in _curves(found, metric)
        for target in curve.get("targets") or ()
    )  # fmt: skip
    return Table("Task tokens needed for a score", columns, rows,
                 frozenset({"General budget", *columns[3:7]}))  # fmt: skip


def _more_interval(target: Json) -> str:
    """Write the interval of further tokens; a missing upper end lies beyond the horizon."""
    low, high = as_number(target.get("low")), as_number(target.get("high"))
    if low is None and high is None:
        return MISSING
    lower = "(beyond the horizon" if low is None else f"[{format_count(low)}"
    upper = "beyond the horizon)" if high is None else f"{format_count(high)}]"
    return f"{lower}, {upper}"


def _gains(metric: str, found: Json) -> Table:
    columns = ("Arm", "General budget", "More task tokens", "Task tokens in all", "Score",
               "Interval")  # fmt: skip
    rows = tuple(
        (
            *_curve_entries(curve),
            Entry(format_count(gain.get("more_tokens"))),
            Entry(format_count(gain.get("task_tokens"))),
            Entry(format_score(gain.get("score")), value=as_number(gain.get("score"))),
            Entry(format_score_interval(gain.get("low"), gain.get("high")) or MISSING),
        )
        for curve in _curves(found, metric)
        for gain in curve.get("gains") or ()
    )
    return Table("Score with more task tokens", columns, rows, frozenset(columns[1:]))


def _backtests(metric: str, found: Json) -> Table:
    columns = ("Arm", "General budget", "Fitted on", "Task tokens", "Forecast", "Interval",
               "Measured", "Inside")  # fmt: skip
    rows = tuple(
        (
            *_curve_entries(curve),
            Entry(", ".join(format_count(tokens) for tokens in test.get("fitted_on") or ())),
            Entry(format_count(test.get("task_tokens"))),
            Entry(format_score(test.get("score")), value=as_number(test.get("score"))),
            Entry(format_score_interval(test.get("low"), test.get("high")) or MISSING),
            Entry(format_score(test.get("observed")), value=as_number(test.get("observed"))),
            Entry("✓ yes" if test.get("is_covered") else "✗ no"),
        )
        for curve in _curves(found, metric)
        for test in curve.get("backtests") or ()
    )
    numeric = frozenset({"General budget", *columns[3:7]})
    return Table("Back-tests: budgets forecast from smaller ones", columns, rows, numeric)


def _curve_entries(curve: Json) -> tuple[Entry, Entry]:
    return (
        Entry(arm_label(str(curve.get("arm")))),
        Entry(format_count(curve.get("general_budget_tokens"))),
    )


def _calibration_table(found: Json) -> Table:
    columns = ("Metric", "Nominal", "Back-tests", "Inside", "Share")
    rows = tuple(
        (
            Entry(metric_title(metric)),
            Entry(format_share(calibration.get("nominal"))),
            Entry(format_count(calibration.get("num_backtests"))),
            Entry(format_count(calibration.get("num_covered"))),
            Entry(format_share(calibration.get("coverage"))),
        )
        for metric, entry in found.items()
        for calibration in (entry.get("calibration") or {},)
    )
    return Table("Calibration by metric", columns, rows, frozenset(columns[1:]))


_BACKTEST_KEYS = (
    LegendKey("back-test, covered", "ink", None, COVERED_MARKER, is_hollow=True),
    LegendKey("back-test, missed", "ink", None, MISSED_MARKER),
)
_STATUSES = {
    "needs_more": "needs more data",
    "reached": "already reached",
    "beyond_horizon": "beyond the horizon",
    "undefined": "undefined",
}
_NO_FORECAST = (
    "No forecast was made in this run (forecast.json is missing or empty). It needs scores of TELL "
    "or SFT at several task budgets."
)
_BACKTEST_NOTE = (
    "A back-test forecasts a larger budget of this run from its smaller ones. It tries forecasts "
    "inside the measured range only, and few back-tests say little about a share."
)
_TOO_NARROW = (
    "Fewer scores lay inside than promised: take the intervals of these forecasts as too narrow."
)
