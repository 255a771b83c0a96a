"""Section on leverage: how many SFT task tokens an arm's task tokens are worth, by budget."""

from collections.abc import Sequence
from functools import partial

from tell_core.analysis.summary import baseline_words
from tell_core.report import figures
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
from tell_core.report.charts import describe_leverage, legend_of, make_chart
from tell_core.report.curves import (
    BASELINES,
    NO_LEVERAGE,
    against,
    arm_label,
    headline_general_budget,
    leverage_points,
    leverage_rows,
    metrics,
    primary_metric,
)
from tell_core.report.figure_data import leverage_data
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_leverage,
    format_leverage_interval,
    format_p_value,
    format_ratio,
    format_score,
    format_score_interval,
    leverage_bound,
    metric_title,
)
from tell_core.report.learning import MAX_PANELS
from tell_core.report.reading import Json, RunFiles


def leverage(run: RunFiles) -> Section:
    """Draw and tabulate the leverage ratio by task budget, against each baseline."""
    if run.leverage is None:
        return Section("leverage", "Leverage by budget", (missing(NO_LEVERAGE),))
    blocks: list[Block] = [Text(_LEVERAGE_INTRO)]
    charts = [chart for metric in metrics(run) for chart in _leverage_panels(run, metric)]
    if charts:
        blocks.append(Panels(tuple(charts[:MAX_PANELS]), _caption(run)))
    else:
        blocks.append(missing("No leverage ratio or bound could be determined; reasons below."))
    for metric in metrics(run):
        if table := _leverage_table(run, metric):
            is_open = metric == primary_metric(run)
            parts = (table, _difference_table(run, metric), Text(_P_NOTE, "note"))
            blocks.append(Fold(f"Table: {metric_title(metric)}", parts, is_open))
    return Section("leverage", "Leverage by budget", blocks)


def _leverage_panels(run: RunFiles, metric: str) -> list[Chart]:
    by_general: dict[str, dict[str, list[figures.LeveragePoint]]] = {}
    for arm, general in leverage_rows(run, metric).items():
        for budget, rows in general.items():
            if points := leverage_points(against(rows, "best")):
                by_general.setdefault(budget, {})[arm] = points
    headline = str(headline_general_budget(run))
    charts = []
    for budget, lines in by_general.items():
        if metric == primary_metric(run) or budget == headline or len(by_general) == 1:
            title = f"{metric_title(metric)}, general budget {_tokens(budget)}"
            charts.append(_leverage_panel(title, f"leverage-{metric}-g{budget}", lines))
    return charts


def _leverage_panel(title: str, name: str, lines: dict[str, list[figures.LeveragePoint]]) -> Chart:
    return make_chart(
        title,
        name,
        partial(figures.leverage_by_budget, lines),
        leverage_data(lines),
        f"Leverage ratio by task budget. {describe_leverage(lines)}",
        legend=legend_of(lines),
    )


def _leverage_table(run: RunFiles, metric: str) -> Table | None:
    rows = [
        _leverage_row(arm, budget, group)
        for arm, general in leverage_rows(run, metric).items()
        for budget, entries in general.items()
        for group in _by_task_budget(entries)
    ]
    if not rows:
        return None
    table = Table(
        caption="Leverage ratio: task tokens SFT needs for the arm's score, divided by the budget",
        columns=("Arm", "General budget", "Task budget", "against SFT", "against SFT matched",
                 "against the best", "SFT task tokens", "Seeds", "Items"),
        rows=tuple(rows),
        numeric=frozenset({"General budget", "Task budget", "SFT task tokens", "Seeds", "Items"}),
    )  # fmt: skip
    return shortened(table)


def _difference_table(run: RunFiles, metric: str) -> Table:
    """Tabulate the advantage in score at the same task budget, with its p-values."""
    columns = ("Arm", "General budget", "Task budget", "Against", "Difference", "Interval", "p",
               "p (Holm)")  # fmt: skip
    rows = tuple(
        _difference_row(arm, budget, entry)
        for arm, general in leverage_rows(run, metric).items()
        for budget, entries in general.items()
        for entry in entries
    )
    caption = f"Score minus that of SFT at the same task budget: {metric_title(metric)}"
    numeric = frozenset(columns) - {"Arm", "Against"}
    return shortened(Table(caption, columns, rows, numeric))


def _difference_row(arm: str, budget: str, entry: Json) -> tuple[Entry, ...]:
    gain: Json = entry.get("advantage") or {}
    difference = as_number(gain.get("difference"))
    ends = format_score_interval(gain.get("low"), gain.get("high"), signed=True)
    baseline = str(entry.get("baseline"))
    return (
        Entry(arm_label(arm)),
        Entry(_tokens(budget)),
        Entry(format_count(entry["task_budget_tokens"])),
        Entry("the best" if baseline == "best" else arm_label(baseline)),
        Entry(format_score(difference, signed=True), value=difference),
        Entry(ends or MISSING),
        *(_p_entry(entry.get(name)) for name in ("p_value", "p_holm")),
    )


def _by_task_budget(entries: Sequence[Json]) -> list[list[Json]]:
    groups: dict[int, list[Json]] = {}
    for entry in entries:
        groups.setdefault(entry["task_budget_tokens"], []).append(entry)
    return list(groups.values())


def _leverage_row(arm: str, budget: str, group: Sequence[Json]) -> tuple[Entry, ...]:
    by_baseline = {str(entry.get("baseline")): entry for entry in group}
    best = by_baseline.get("best") or group[0]
    return (
        Entry(arm_label(arm)),
        Entry(_tokens(budget)),
        Entry(format_count(best["task_budget_tokens"])),
        *(_ratio_entry(by_baseline.get(baseline)) for baseline in BASELINES),
        Entry(_equivalent(best), value=as_number(best.get("sft_equivalent_tokens"))),
        Entry(format_count(best.get("num_seeds"))),
        Entry(format_count(best.get("num_items"))),
    )


def _ratio_entry(row: Json | None) -> Entry:
    if row is None:
        return Entry(MISSING, remark="no such baseline in this run")
    ratio, bound = as_number(row.get("ratio")), leverage_bound(row)
    return Entry(format_leverage(row), value=bound if ratio is None else ratio, remark=_remark(row))


def _p_entry(value: object) -> Entry:
    return Entry(format_p_value(value), value=as_number(value))


def _remark(row: Json) -> str:
    """Say why a ratio is a bound or undefined, with what is known of it."""
    if row.get("censored") == "none":
        return ""
    reason = str(row.get("reason") or "no reason recorded")
    if leverage_bound(row) is not None:
        return f"interval {format_leverage_interval(row)}; {reason}"
    ratio = as_number(row.get("ratio"))
    return reason if ratio is None else f"{reason}; point estimate {format_ratio(ratio)}×"


def _equivalent(row: Json) -> str:
    sign = {"above": "≥ ", "below": "≤ "}.get(str(row.get("censored")), "")
    tokens = format_count(row.get("sft_equivalent_tokens"))
    return tokens if tokens == MISSING else sign + tokens


def _tokens(budget: str) -> str:
    return format_count(int(budget)) if budget.isdigit() else MISSING


def _caption(run: RunFiles) -> str:
    against = baseline_words((run.leverage or {}).get("baselines") or ())
    return (
        f"Against {against}. Bars: paired intervals over seeds (Student's t) and items (bootstrap),"
        " with an arrow where they are unbounded. Hollow markers: bounds. The line at 1×: no"
        " leverage."
    )


_LEVERAGE_INTRO = (
    "The leverage ratio is the number of task tokens SFT needs for the score an arm reaches with "
    "its task budget, divided by that budget. Above 1 the arm saves task data; at 1 it saves none; "
    "below 1 plain SFT is the better use of the same data. Scores are never extrapolated: beyond "
    "the SFT curve there is only a bound."
)
_P_NOTE = (
    "p: two-sided, of the difference in the line. p (Holm): the same, corrected for all arms and "
    "budgets compared with that baseline by that metric. A positive difference is better."
)
