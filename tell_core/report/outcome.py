"""Sections on the outcome: the answer, learning curves, leverage by budget, the price paid."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure

from tell_core.analysis.summary import verdict_sentence
from tell_core.report import figures
from tell_core.report.blocks import (
    Block,
    Bullets,
    Chart,
    Entry,
    Facts,
    Fold,
    LegendKey,
    Panels,
    Section,
    Table,
    Text,
    missing,
    shortened,
)
from tell_core.report.curves import (
    BASELINES,
    CurvePoint,
    against,
    arm_label,
    arm_place,
    as_levels,
    as_series,
    at_general_budget,
    curve_points,
    general_budgets,
    headline_general_budget,
    headline_reach,
    headline_rows,
    lead_row,
    leverage_points,
    leverage_rows,
    metrics,
    primary_metric,
)
from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_leverage,
    format_leverage_interval,
    format_ratio,
    format_score,
    format_score_interval,
    format_short_tokens,
    leverage_bound,
    metric_title,
    plural,
)
from tell_core.report.palette import MARKER_PATHS, Palette, style_of
from tell_core.report.reading import Json, RunFiles
from tell_core.report.svg import to_svg

MAX_PANELS = 12
PRICE_METRIC = "general_log_probability"
MAIN_ARMS = frozenset({"tell", "sft", "sft_matched", "base", "base_few_shot", "general_only"})


def answer(run: RunFiles) -> Section:
    """Say first what the run found, in plain words, with the one figure that shows it."""
    blocks: list[Block] = [Text(verdict(run), tone="lead")]
    if tiles := _leverage_tiles(run):
        blocks += [Text(_TILES_INTRO, "note"), tiles]
    chart = main_chart(run)
    blocks.append(chart or missing("No scores were found in this run, so there is no figure."))
    blocks += _in_words(run)
    blocks.append(Fold("What the words mean", (Facts(_GLOSSARY),)))
    return Section("answer", "The answer", blocks)


def main_chart(run: RunFiles) -> Chart | None:
    """Return the one figure: TELL against SFT by task tokens, drawn for wide and narrow pages."""
    points = main_points(run)
    if not as_series(points):
        return None
    return Chart(
        title="TELL against SFT",
        svg=to_svg(partial(draw_main, run, size=figures.WIDE), "main"),
        narrow_svg=to_svg(partial(draw_main, run, size=figures.NARROW), "main-narrow"),
        caption=_main_caption(run, points),
    )


def draw_main(run: RunFiles, palette: Palette, *, size: figures.Size) -> Figure:
    """Draw the one figure with the given palette and size in inches."""
    points = main_points(run)
    return figures.learning_curves(
        as_series(points),
        as_levels(points),
        palette,
        size=size,
        y_label=metric_title(primary_metric(run)),
        x_label="Task tokens used",
        reach=headline_reach(run, points),
        has_labels=True,
    )


def main_points(run: RunFiles) -> list[CurvePoint]:
    """Return the points of the main arms at the headline's general budget."""
    points = curve_points(run, primary_metric(run))
    chosen = at_general_budget(points, headline_general_budget(run))
    return [point for point in chosen if point.arm in MAIN_ARMS]


def learning_curves(run: RunFiles) -> Section:
    """Draw every arm's score against task tokens, a panel per metric and general budget."""
    charts = [chart for metric in metrics(run) for chart in _metric_panels(run, metric)]
    if not charts:
        return Section("curves", "Learning curves", (missing(_NO_RESULTS),))
    legend = legend_of(point.arm for metric in metrics(run) for point in curve_points(run, metric))
    panels_block = Panels(tuple(charts[:MAX_PANELS]), legend, _CURVES_CAPTION)
    general = _general_growth(run)
    return Section("curves", "Learning curves", (panels_block, *general, _curve_table(run)))


def leverage(run: RunFiles) -> Section:
    """Draw and tabulate the leverage ratio by task budget, against each baseline."""
    if run.leverage is None:
        return Section("leverage", "Leverage by budget", (missing(_NO_LEVERAGE),))
    blocks: list[Block] = [Text(_LEVERAGE_INTRO)]
    charts = [chart for metric in metrics(run) for chart in _leverage_panels(run, metric)]
    arms = [arm for metric in metrics(run) for arm in leverage_rows(run, metric)]
    if charts:
        blocks.append(Panels(tuple(charts[:MAX_PANELS]), legend_of(arms), _LEVERAGE_CAPTION))
    else:
        blocks.append(missing("No leverage ratio or bound could be determined; reasons below."))
    for metric in metrics(run):
        if table := _leverage_table(run, metric):
            is_open = metric == primary_metric(run)
            blocks.append(Fold(f"Table: {metric_title(metric)}", (table,), is_open))
    return Section("leverage", "Leverage by budget", blocks)


def price(run: RunFiles) -> Section:
    """Show what each arm did to the log-probability of held-out general data, against base."""
    title = "The price in general ability"
    points = curve_points(run, PRICE_METRIC)
    base = next((point for point in points if point.arm == "base"), None)
    if not points:
        return Section("price", title, (missing(_NO_PRICE),))
    if base is None:
        table = _price_table(points, 0.0)
        return Section("price", title, (missing(_NO_BASE), table))
    changed = [_minus(point, base.mean) for point in points]
    panels = [
        _curve_panel(PRICE_METRIC, budget, changed, y_label="Change against base, nats")
        for budget in general_budgets(points)[:MAX_PANELS] or (None,)
    ]
    charts = tuple(panel for panel in panels if panel is not None)
    blocks: list[Block] = [Text(_PRICE_INTRO)]
    if charts:
        blocks.append(Panels(charts, legend_of(point.arm for point in points)))
    return Section("price", title, (*blocks, _price_table(points, base.mean)))


def legend_of(arms: Iterable[str]) -> tuple[LegendKey, ...]:
    """Return the legend entries of some arms, each once, in their usual order."""
    keys = []
    for arm in sorted(set(arms), key=arm_place):
        style = style_of(arm)
        dashes = " ".join(f"{length * style.width:.1f}" for length in style.dashes)
        keys.append(LegendKey(arm_label(arm), style.colour, dashes, MARKER_PATHS[style.marker]))
    return tuple(keys)


def verdict(run: RunFiles) -> str:
    """Return the headline in words: the largest leverage shown, and where leverage ends.

    It is about TELL at the headline's general budget, by the primary metric, against the best
    SFT. Without a leverage above 1 that is shown, it says so; without any interval, why not.
    """
    if run.leverage is None:
        return f"Undetermined. {_NO_LEVERAGE}"
    rows = headline_rows(run)
    sentences = verdict_sentence(_at_headline(run.leverage, run))
    if not rows:
        return sentences[0]
    if all(row.get("censored") == "undefined" for row in rows):
        return f"Undetermined. {sentences[0]}"
    lead = lead_row(run)
    return sentences[-1] if lead is None else f"{sentences[rows.index(lead)]} {sentences[-1]}"


def _at_headline(leverage: Json, run: RunFiles) -> Json:
    """Keep the leverage of TELL at the headline's general budget only."""
    metric = primary_metric(run)
    entry = (leverage.get("metrics") or {}).get(metric) or {}
    rows = headline_rows(run)
    arms = {"tell": {str(headline_general_budget(run) or 0): rows}} if rows else {}
    return {**leverage, "metrics": {metric: {**entry, "arms": arms}} if entry else {}}


def _in_words(run: RunFiles) -> tuple[Fold, ...]:
    """Give the analysis' sentence for every budget, behind a line that opens them."""
    if run.leverage is None or not headline_rows(run):
        return ()
    return (Fold("Budget by budget, in words", (Bullets(tuple(verdict_sentence(run.leverage))),)),)


def _leverage_tiles(run: RunFiles) -> Facts | None:
    rows = headline_rows(run)
    if not rows:
        return None
    tiles = [
        (f"{format_short_tokens(row['task_budget_tokens'])} task tokens", format_leverage(row))
        for row in rows
    ]
    return Facts(tuple(tiles))


def _main_caption(run: RunFiles, points: Sequence[CurvePoint]) -> str:
    budget = headline_general_budget(run)
    general = f" General budget {format_count(budget)} tokens." if budget else ""
    has_interval = any(point.low is not None for point in points)
    confidence = as_number((run.leverage or {}).get("confidence")) or 0.95
    shades = f" Shaded: {100 * confidence:g} % intervals." if has_interval else ""
    arrow = _arrow_sentence(headline_reach(run, points))
    entry = ((run.leverage or {}).get("metrics") or {}).get(primary_metric(run)) or {}
    better = "Lower" if entry.get("higher_is_better") is False else "Higher"
    return f"{better} is better. Faint dots: single seeds.{shades}{arrow}{general}"


def _arrow_sentence(reach: figures.Reach | None) -> str:
    if reach is None:
        return ""
    if reach.is_bound:
        return (
            " The dashed arrow leads to the most task tokens SFT had: it stayed below that score."
        )
    return " The arrow leads from TELL to the task tokens SFT needs for the same score."


def _metric_panels(run: RunFiles, metric: str) -> list[Chart]:
    """Draw the primary metric at every general budget, the others at the headline's."""
    if metric == PRICE_METRIC:
        return []  # it has a section of its own
    points = curve_points(run, metric)
    budgets: Sequence[int | None] = (headline_general_budget(run),)
    if metric == primary_metric(run):
        budgets = general_budgets(points) or (None,)
    panels = [_curve_panel(metric, budget, points) for budget in budgets]
    return [panel for panel in panels if panel is not None]


def _curve_panel(
    metric: str, budget: int | None, points: Iterable[CurvePoint], *, y_label: str = ""
) -> Chart | None:
    chosen = at_general_budget(points, budget)
    series, levels = as_series(chosen), as_levels(chosen)
    if not series:
        return None
    draw = partial(_draw_curves, series, levels, y_label or _short_title(metric))
    title = "Change of general log-probability" if y_label else metric_title(metric)
    general = f", general budget {format_count(budget)}" if budget is not None else ""
    name = f"curve-{_slug(metric)}-{budget or 0}-{'change' if y_label else 'score'}"
    return Chart(f"{title}{general}", to_svg(draw, name), "")


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
    charts = []
    for budget in sorted({point.task_budget_tokens or 0 for point in points})[:MAX_PANELS]:
        line = [
            replace(point, task_tokens=float(point.general_budget_tokens or 0))
            for point in points
            if point.task_budget_tokens == budget and point.general_budget_tokens
        ]
        draw = partial(
            figures.learning_curves,
            as_series(line),
            (),
            y_label=_short_title(metric),
            x_label="General tokens",
        )
        title = f"TELL at {format_count(budget)} task tokens"
        charts.append(Chart(title, to_svg(draw, f"growth-{budget}"), ""))
    caption = "The same task data with more and more general data, each panel on its own scale."
    return (Panels(tuple(charts), legend_of(["tell"]), caption),)


def _curve_table(run: RunFiles) -> Fold:
    tables = [
        Table(
            caption=metric_title(metric),
            columns=("Arm", "Task budget", "General budget", "Task tokens used", "Mean",
                     "Interval", "Seeds"),
            rows=tuple(
                _curve_row(point) for point in _in_order(curve_points(run, metric))
            ),
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
            draw = partial(figures.leverage_by_budget, lines)
            title = f"{metric_title(metric)}, general budget {_tokens(budget)}"
            charts.append(Chart(title, to_svg(draw, f"leverage-{_slug(metric)}-{budget}"), ""))
    return charts


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
                 "against the best", "SFT task tokens", "Score difference", "Seeds", "Items"),
        rows=tuple(rows),
        numeric=frozenset({"General budget", "Task budget", "SFT task tokens", "Seeds", "Items"}),
    )  # fmt: skip
    return shortened(table)


def _by_task_budget(entries: Sequence[Json]) -> list[list[Json]]:
    groups: dict[int, list[Json]] = {}
    for entry in entries:
        groups.setdefault(entry["task_budget_tokens"], []).append(entry)
    return list(groups.values())


def _leverage_row(arm: str, budget: str, group: Sequence[Json]) -> tuple[Entry, ...]:
    by_baseline = {str(entry.get("baseline")): entry for entry in group}
    best = by_baseline.get("best") or group[0]
    gain = best.get("advantage") or {}
    difference = format_score(gain.get("difference"), signed=True)
    ends = format_score_interval(gain.get("low"), gain.get("high"), signed=True)
    return (
        Entry(arm_label(arm)),
        Entry(_tokens(budget)),
        Entry(format_count(best["task_budget_tokens"])),
        *(_ratio_entry(by_baseline.get(baseline)) for baseline in BASELINES),
        Entry(_equivalent(best), value=as_number(best.get("sft_equivalent_tokens"))),
        Entry(f"{difference} {ends}".strip(), value=as_number(gain.get("difference"))),
        Entry(format_count(best.get("num_seeds"))),
        Entry(format_count(best.get("num_items"))),
    )


def _ratio_entry(row: Json | None) -> Entry:
    if row is None:
        return Entry(MISSING, remark="no such baseline in this run")
    ratio, bound = as_number(row.get("ratio")), leverage_bound(row)
    return Entry(format_leverage(row), value=bound if ratio is None else ratio, remark=_remark(row))


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


def _price_table(points: Iterable[CurvePoint], base: float) -> Table:
    table = Table(
        caption="Log-probability of held-out general data, nats per token",
        columns=("Arm", "Task budget", "General budget", "Score", "Change against base",
                 "Interval of the change"),
        rows=tuple(_price_row(point, base) for point in _in_order(points)),
        numeric=frozenset({"Task budget", "General budget", "Score", "Change against base",
                           "Interval of the change"}),
    )  # fmt: skip
    return shortened(table)


def _price_row(point: CurvePoint, base: float) -> tuple[Entry, ...]:
    change = _minus(point, base)
    return (
        Entry(arm_label(point.arm)),
        Entry(format_count(point.task_budget_tokens)),
        Entry(format_count(point.general_budget_tokens)),
        Entry(format_score(point.mean), value=point.mean),
        Entry(format_score(change.mean, signed=True), value=change.mean),
        Entry(format_score_interval(change.low, change.high, signed=True) or MISSING),
    )


def _minus(point: CurvePoint, base: float) -> CurvePoint:
    return replace(
        point,
        mean=point.mean - base,
        low=None if point.low is None else point.low - base,
        high=None if point.high is None else point.high - base,
        seeds=tuple(score - base for score in point.seeds),
    )


def _in_order(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    return sorted(
        points,
        key=lambda p: (
            arm_place(p.arm),
            p.general_budget_tokens or 0,
            p.task_budget_tokens or 0,
        ),
    )


def _short_title(metric: str) -> str:
    return metric_title(metric).split(",")[0].replace(" of the reference", "")


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _tokens(budget: str) -> str:
    return format_count(int(budget)) if budget.isdigit() else MISSING


_TILES_INTRO = (
    "Leverage ratio by task budget, against the better of SFT and SFT matched, with its interval:"
)
_NO_RESULTS = (
    "This run has no scores yet (results.parquet and leverage.json are missing). "
    "Run the experiment to its end, then draw the report again."
)
_NO_LEVERAGE = (
    "No leverage was analysed in this run (leverage.json is missing): the analysis needs the arms "
    "sft and tell at shared task budgets."
)
_NO_PRICE = (
    "The log-probability of held-out general data was not measured in this run, so the price paid "
    "in general ability is unknown."
)
_NO_BASE = (
    "The arm base was not run, so there is nothing to compare general ability with; the table "
    "shows the bare scores (the change is against zero)."
)
_CURVES_CAPTION = (
    "Score against task tokens used, on a logarithmic axis. Shaded: intervals; faint dots: single "
    "seeds. Arms without task data are horizontal lines."
)
_LEVERAGE_INTRO = (
    "The leverage ratio is the number of task tokens SFT needs for the score an arm reaches with "
    "its task budget, divided by that budget. Above 1 the arm saves task data; at 1 it saves none; "
    "below 1 plain SFT is the better use of the same data. Scores are never extrapolated: beyond "
    "the SFT curve there is only a bound."
)
_LEVERAGE_CAPTION = (
    "Against the better of SFT and SFT matched. Bars: intervals from a paired bootstrap over seeds "
    "and items, with an arrow where they are unbounded. Hollow markers: bounds. The line at 1×: "
    "no leverage."
)
_PRICE_INTRO = (
    "Log-probability of held-out general data under each arm, minus that of the base model "
    "(taken as fixed). Below zero, general ability was lost."
)
_GLOSSARY = (
    ("Task budget", "Upper bound on task tokens, counted before the anchor prompt is added."),
    ("General budget", "Upper bound on tokens of general instruction data mixed in."),
    ("Anchor prompt", "Constant text on every task prompt, in training and at evaluation."),
    ("Leverage ratio", "SFT task tokens divided by TELL task tokens at equal score."),
    ("SFT matched", "SFT on the same task data, repeated to as many optimiser steps as TELL."),
    ("Arm", "One way of training. A cell is one arm at one task and general budget and seed."),
    ("General only", "Trained on general data alone, without any task example."),
)


def describe_counts(run: RunFiles) -> str:
    """Say in one line how large the experiment was."""
    arms = {cell.arm for cell in run.cells}
    seeds = {cell.seed for cell in run.cells}
    tasks = {c.task_budget_tokens for c in run.cells if c.task_budget_tokens is not None}
    return ", ".join(
        (
            plural(len(run.cells), "cell"),
            plural(len(arms), "arm"),
            plural(len(tasks), "task budget"),
            plural(len(seeds), "seed"),
        )
    )
