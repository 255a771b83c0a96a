"""Section on learning curves: every arm's score against task tokens, and against general ones."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure

from tell_core.report import figures
from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Fold,
    Panels,
    Section,
    Table,
    missing,
    shortened,
)
from tell_core.report.charts import describe_curves, legend_of, make_chart
from tell_core.report.curves import (
    CurvePoint,
    arm_label,
    as_levels,
    as_series,
    at_general_budget,
    curve_points,
    general_budgets,
    headline_general_budget,
    in_order,
    metrics,
    primary_metric,
    test_metrics,
)
from tell_core.report.figure_data import curve_data
from tell_core.report.formats import (
    MISSING,
    format_count,
    format_score,
    format_score_interval,
    metric_title,
    short_metric_title,
)
from tell_core.report.palette import Palette
from tell_core.report.reading import RunFiles

MAX_PANELS = 12


def learning_curves(run: RunFiles) -> Section:
    """Draw every arm's score against task tokens, a panel per metric and general budget."""
    charts = [chart for metric in test_metrics(run) for chart in _metric_panels(run, metric)]
    if not charts:
        return Section("curves", "Learning curves", (missing(_NO_RESULTS),))
    panels = Panels(tuple(charts[:MAX_PANELS]), _CURVES_CAPTION)
    general = _general_growth(run)
    return Section("curves", "Learning curves", (panels, *general, _curve_table(run)))


def curve_panel(title: str, name: str, y_label: str, points: Iterable[CurvePoint]) -> Chart | None:
    """Draw one panel of curves and levels, or nothing where no arm has task data."""
    chosen = list(points)
    series, levels = as_series(chosen), as_levels(chosen)
    if not series:
        return None
    draw = partial(_draw_curves, series, levels, y_label)
    alt = f"{y_label} by task tokens. {describe_curves(series, levels)}"
    legend = legend_of([one.arm for one in series] + [level.arm for level in levels])
    return make_chart(title, name, draw, curve_data(series, levels), alt, legend=legend)


def _metric_panels(run: RunFiles, metric: str) -> list[Chart]:
    """Draw the primary metric at every general budget, the others at the headline's."""
    points = curve_points(run, metric)
    budgets: Sequence[int | None] = (headline_general_budget(run),)
    if metric == primary_metric(run):
        budgets = general_budgets(points) or (None,)
    panels = []
    for budget in budgets:
        general = f", general budget {format_count(budget)}" if budget is not None else ""
        title, name = f"{metric_title(metric)}{general}", f"curve-{metric}-g{budget or 0}"
        chosen = at_general_budget(points, budget)
        panels.append(curve_panel(title, name, short_metric_title(metric), chosen))
    return [panel for panel in panels if panel is not None]


def _draw_curves(
    series: Sequence[figures.Series],
    levels: Sequence[figures.Level],
    y_label: str,
    palette: Palette,
) -> Figure:
    return figures.learning_curves(series, levels, palette, y_label=y_label)


def _general_growth(run: RunFiles) -> tuple[Block, ...]:
    """Draw score against general tokens at fixed task budgets, when three or more were tried."""
    metric = primary_metric(run)
    points = [point for point in curve_points(run, metric) if point.arm == "tell"]
    if len(general_budgets(points)) < 3:
        return ()
    budgets = sorted({point.task_budget_tokens or 0 for point in points})[:MAX_PANELS]
    charts = tuple(_growth_panel(budget, points, short_metric_title(metric)) for budget in budgets)
    caption = "The same task data with more and more general data, each panel on its own scale."
    return (Panels(charts, caption),)


def _growth_panel(budget: int, points: Iterable[CurvePoint], y_label: str) -> Chart:
    series = as_series(
        replace(point, task_tokens=float(point.general_budget_tokens or 0))
        for point in points
        if point.task_budget_tokens == budget and point.general_budget_tokens
    )
    draw = partial(figures.learning_curves, series, (), y_label=y_label, x_label="General tokens")
    return make_chart(
        f"TELL at {format_count(budget)} task tokens",
        f"growth-t{budget}",
        draw,
        curve_data(series, (), "general_tokens"),
        f"{y_label} by general tokens. {describe_curves(series, unit='general tokens')}",
        legend=legend_of(["tell"]),
    )


def _curve_table(run: RunFiles) -> Fold:
    tables = [
        Table(
            caption=metric_title(metric),
            columns=("Arm", "Task budget", "General budget", "Task tokens used", "Mean",
                     "Interval", "Seeds"),
            rows=tuple(_curve_row(point) for point in in_order(curve_points(run, metric))),
            numeric=frozenset({"Task budget", "General budget", "Task tokens used", "Mean",
                               "Interval"}),
        )
        for metric in metrics(run)
    ]  # fmt: skip
    return Fold("The numbers behind the curves", [shortened(table) for table in tables])


def _curve_row(point: CurvePoint) -> tuple[Entry, ...]:
    return (
        Entry(arm_label(point.arm)),
        Entry(format_count(point.task_budget_tokens)),
        Entry(format_count(point.general_budget_tokens)),
        Entry(format_count(point.task_tokens)),
        Entry(format_score(point.mean), value=point.mean),
        Entry(format_score_interval(point.low, point.high) or MISSING),
        Entry(", ".join(format_score(score) for score in point.seeds)),
    )


_NO_RESULTS = (
    "This run has no scores yet (results.parquet and leverage.json are missing). "
    "Run the experiment to its end, then draw the report again."
)
_CURVES_CAPTION = (
    "Score against task tokens used, on a logarithmic axis. Shaded: intervals; faint dots: single "
    "seeds. Arms without task data are horizontal lines."
)
