"""Section on the answer: what the run found, in one sentence and one figure."""

from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure

from tell_core.analysis.summary import baseline_words, verdict_sentence
from tell_core.report import figures
from tell_core.report.axes import Size
from tell_core.report.blocks import (
    Block,
    Bullets,
    Chart,
    Facts,
    Fold,
    Section,
    Text,
    missing,
)
from tell_core.report.charts import describe_curves, make_chart
from tell_core.report.curves import (
    NO_LEVERAGE,
    CurvePoint,
    as_levels,
    as_series,
    at_general_budget,
    curve_points,
    headline_general_budget,
    headline_reach,
    headline_rows,
    lead_row,
    primary_metric,
)
from tell_core.report.figure_data import curve_data
from tell_core.report.formats import (
    as_number,
    format_count,
    format_leverage,
    format_short_tokens,
    metric_title,
    plural,
)
from tell_core.report.palette import Palette
from tell_core.report.reading import Json, RunFiles

MAIN_FIGURE = "learning_curves"
MAIN_ARMS = frozenset({"tell", "sft", "sft_matched", "base", "base_few_shot", "general_only"})


def answer(run: RunFiles) -> Section:
    """Say first what the run found, in plain words, with the one figure that shows it."""
    blocks: list[Block] = [Text(verdict(run), tone="lead")]
    if tiles := _leverage_tiles(run):
        against = baseline_words((run.leverage or {}).get("baselines") or ())
        intro = f"Leverage ratio by task budget, against {against}, with its interval:"
        blocks += [Text(intro, "note"), tiles]
    chart = main_chart(run)
    blocks.append(chart or missing("No scores were found in this run, so there is no figure."))
    blocks += _in_words(run)
    blocks.append(Fold("What the words mean", (Facts(_GLOSSARY),)))
    return Section("answer", "The answer", blocks)


def main_chart(run: RunFiles) -> Chart | None:
    """Return the one figure: TELL against SFT by task tokens, drawn for wide and narrow pages."""
    points = main_points(run)
    series, levels = as_series(points), as_levels(points)
    if not series:
        return None
    alt = f"{metric_title(primary_metric(run))}. {describe_curves(series, levels)}"
    return make_chart(
        "TELL against SFT",
        MAIN_FIGURE,
        partial(draw_main, run, size=figures.WIDE),
        curve_data(series, levels),
        alt,
        narrow=partial(draw_main, run, size=figures.NARROW),
        caption=_main_caption(run, points),
    )


def draw_main(run: RunFiles, palette: Palette, *, size: Size) -> Figure:
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


def verdict(run: RunFiles) -> str:
    """Return the headline in words: the largest leverage shown, and where leverage ends.

    It is about TELL at the headline's general budget, by the primary metric, against the best
    SFT. Without a leverage above 1 that is shown, it says so; without any interval, why not.
    """
    if run.leverage is None:
        return f"Undetermined. {NO_LEVERAGE}"
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


_GLOSSARY = (
    ("Task budget", "Upper bound on task tokens, counted before the anchor prompt is added."),
    ("General budget", "Upper bound on tokens of general instruction data mixed in."),
    ("Anchor prompt", "Constant text on every task prompt, in training and at evaluation."),
    ("Leverage ratio", "SFT task tokens divided by TELL task tokens at equal score."),
    ("SFT matched", "SFT on the same task data, repeated to as many optimiser steps as TELL."),
    ("Arm", "One way of training. A cell is one arm at one task and general budget and seed."),
    ("General only", "Trained on general data alone, without any task example."),
)
