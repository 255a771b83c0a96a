"""Section on the price: what training did to abilities outside the task, against the base model."""

from collections.abc import Sequence

from tell_core.report.blocks import (
    Block,
    Chart,
    Entry,
    Fold,
    Panels,
    Section,
    Table,
    Text,
    missing,
    shortened,
)
from tell_core.report.curves import (
    CurvePoint,
    arm_label,
    at_general_budget,
    curve_points,
    general_budgets,
    in_order,
    is_price_metric,
    metrics,
)
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_score,
    format_score_interval,
    metric_title,
    short_metric_title,
)
from tell_core.report.learning import MAX_PANELS, curve_panel
from tell_core.report.reading import Json, RunFiles

TITLE = "The price in general ability"


def price(run: RunFiles) -> Section:
    """Show what each arm did to general data, retention set and harness tasks, against base."""
    rows: list[Json] = list((run.leverage or {}).get("price") or ())
    if not rows:
        has_scores = any(is_price_metric(metric) for metric in metrics(run))
        return Section("price", TITLE, (missing(_NOT_COMPARED if has_scores else _NO_PRICE),))
    names = list(dict.fromkeys(str(row["metric"]) for row in rows))
    charts = [chart for name in names for chart in _panels(name, rows)]
    blocks: list[Block] = [Text(_INTRO)]
    if charts:
        blocks.append(Panels(tuple(charts[:MAX_PANELS]), _CAPTION))
    for place, name in enumerate(names):
        blocks.append(Fold(f"Table: {metric_title(name)}", (_table(run, name, rows),), place == 0))
    return Section("price", TITLE, blocks)


def _panels(metric: str, rows: Sequence[Json]) -> list[Chart]:
    """Draw the change by task tokens, a panel per general budget, with base as a line at zero."""
    points = [point for row in rows if row["metric"] == metric and (point := _as_point(row))]
    base = CurvePoint("base", None, None, None, 0.0, None, None, ())
    panels = []
    for budget in general_budgets(points) or (None,):
        general = f", general budget {format_count(budget)}" if budget is not None else ""
        title = f"Change of {_lowered(short_metric_title(metric))}{general}"
        chosen = [*at_general_budget(points, budget), base]
        name = f"price-{metric}-g{budget or 0}"
        panels.append(curve_panel(title, name, _unit(metric), chosen))
    return [panel for panel in panels if panel is not None]


def _as_point(row: Json) -> CurvePoint | None:
    change, task = as_number(row.get("change")), as_number(row.get("task_budget_tokens"))
    if change is None or row["arm"] == "base":
        return None
    return CurvePoint(
        arm=str(row["arm"]),
        task_budget_tokens=row.get("task_budget_tokens"),
        general_budget_tokens=row.get("general_budget_tokens"),
        task_tokens=task,
        mean=change,
        low=as_number(row.get("low")),
        high=as_number(row.get("high")),
        seeds=(),
    )


def _unit(metric: str) -> str:
    return "Change, nats per token" if metric.endswith("log_probability") else "Change of the score"


def _lowered(title: str) -> str:
    """Write a title's first word small where it is a word and no abbreviation."""
    return title[0].lower() + title[1:] if title[1:2].islower() else title


def _table(run: RunFiles, metric: str, rows: Sequence[Json]) -> Table:
    columns = ("Arm", "Task budget", "General budget", "Score", "Change against base",
               "Interval of the change", "Items", "Seeds")  # fmt: skip
    scores = {_place(p.arm, p.task_budget_tokens, p.general_budget_tokens): p
              for p in in_order(curve_points(run, metric))}  # fmt: skip
    found = {_place(row["arm"], row["task_budget_tokens"], row["general_budget_tokens"]): row
             for row in rows if row["metric"] == metric}  # fmt: skip
    ordered = [place for place in scores if place in found]
    ordered += [place for place in found if place not in scores]
    table = Table(
        caption=metric_title(metric),
        columns=columns,
        rows=tuple(_row(found[place], scores.get(place)) for place in ordered),
        numeric=frozenset(columns[1:]),
    )
    return shortened(table)


def _place(arm: str, task: int | None, general: int | None) -> tuple[str, int | None, int | None]:
    return arm, task, general


def _row(row: Json, point: CurvePoint | None) -> tuple[Entry, ...]:
    change = as_number(row.get("change"))
    score = None if point is None else point.mean
    return (
        Entry(arm_label(str(row["arm"]))),
        Entry(format_count(row.get("task_budget_tokens"))),
        Entry(format_count(row.get("general_budget_tokens"))),
        Entry(format_score(score), value=score),
        Entry(format_score(change, signed=True), value=change, remark=str(row.get("reason") or "")),
        Entry(format_score_interval(row.get("low"), row.get("high"), signed=True) or MISSING),
        Entry(format_count(row.get("num_items"))),
        Entry(format_count(row.get("num_seeds"))),
    )


_NO_PRICE = (
    "Nothing outside the task was measured in this run, so the price paid in general ability is "
    "unknown. Held-out general data (curation.general_heldout_examples), a retention set or harness"
    " tasks would show it."
)
_NOT_COMPARED = (
    "General ability was scored but not compared with the base model: the arm base was not run, or "
    "the analysis is older than this comparison. Run the experiment again with the arm base."
)
_INTRO = (
    "Score of each arm on data outside the task, minus that of the base model on the same items. "
    "Below zero, ability was lost; the line at zero is the base model."
)
_CAPTION = (
    "Change against task budget, on a logarithmic axis. Shaded: intervals over seeds and items, "
    "paired with the base model's scores."
)
