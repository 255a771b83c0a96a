"""Figures of the report, drawn with matplotlib on no background, in colours called by name.

Arms differ by dashes and markers as well as by colour. ``tell_core.report.svg`` turns a drawing
into SVG or PNG.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tell_core.report.axes import Size, line_style, log_token_axis, new_axes, plain_axes
from tell_core.report.formats import format_short_tokens
from tell_core.report.palette import Palette, style_of
from tell_core.report.svg import drawing_settings

PANEL: Size = (4.2, 2.9)
WIDE: Size = (10.0, 4.9)
NARROW: Size = (4.2, 4.4)

_RATIO_TICKS = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Point:
    """A mean with its interval; ``low`` and ``high`` None where there is none."""

    x: float
    mean: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """The points of one arm, by rising x."""

    arm: str
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Level:
    """A horizontal line: an arm that uses no task data."""

    arm: str
    label: str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Reach:
    """The leverage arrow: from TELL at a budget to the SFT tokens of equal score."""

    from_tokens: float
    to_tokens: float
    score: float
    label: str
    is_bound: bool


@dataclass(frozen=True)
class LeveragePoint:
    """One leverage ratio; ``bound`` "above" or "below" when only a bound is known."""

    budget_tokens: float
    ratio: float
    low: float | None
    high: float | None
    bound: str


def learning_curves(
    series: Sequence[Series],
    levels: Sequence[Level],
    palette: Palette,
    *,
    size: Size = PANEL,
    y_label: str = "",
    x_label: str = "Task tokens",
    reach: Reach | None = None,
    has_labels: bool = False,
) -> Figure:
    """Draw score against tokens on a log axis, intervals shaded, seeds as faint dots."""
    figure, axes = new_axes(palette, size, right=1.15 if has_labels else 0.1)
    for level in levels:
        _draw_level(axes, level, palette)
    for one in series:
        _draw_series(axes, one, palette)
    log_token_axis(axes, [point.x for one in series for point in one.points])
    axes.set_ylabel(y_label)
    axes.set_xlabel(x_label)
    if reach is not None:
        _draw_reach(axes, reach, palette)
    if has_labels:
        _label_ends(axes, series, levels, palette)
    return figure


def leverage_by_budget(
    lines: Mapping[str, Sequence[LeveragePoint]], palette: Palette, *, size: Size = PANEL
) -> Figure:
    """Draw leverage ratios by task budget; bounds are arrows, the line at 1 is no leverage."""
    figure, axes = new_axes(palette, size)
    axes.set_yscale("log")
    axes.axhline(1.0, color=palette["ink"], linewidth=1.1)
    places = np.linspace(-1, 1, len(lines)) * (0.0 if len(lines) == 1 else 0.045)
    for (arm, points), place in zip(lines.items(), places, strict=True):
        _draw_leverage(axes, arm, points, 10.0**place, palette)
    everything = [point for points in lines.values() for point in points]
    log_token_axis(axes, [point.budget_tokens for point in everything])
    _ratio_axis(axes)
    axes.set_xlabel("Task budget, tokens")
    axes.set_ylabel("Leverage ratio")
    return figure


def loss_curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    palette: Palette,
    *,
    y_label: str,
    size: Size = PANEL,
) -> Figure:
    """Draw (step, loss) lines of several arms, both axes logarithmic in steps only."""
    figure, axes = new_axes(palette, size)
    for arm, points in lines.items():
        style = style_of(arm)
        steps, losses = zip(*points, strict=True)
        axes.plot(
            steps, losses, color=palette[style.colour], **line_style(style.dashes, style.width)
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(y_label)
    return figure


def spread_by_budget(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    palette: Palette,
    *,
    y_label: str,
    highest: float,
) -> Figure:
    """Draw (task tokens, standard deviation) lines of several arms, from zero to ``highest``."""
    figure, axes = new_axes(palette, PANEL)
    for arm, points in lines.items():
        style = style_of(arm)
        budgets, spreads = zip(*points, strict=True)
        axes.plot(
            budgets, spreads, color=palette[style.colour], marker=style.marker, ms=5.5,
            markeredgewidth=0, **line_style(style.dashes, style.width),
        )  # fmt: skip
    log_token_axis(axes, [budget for points in lines.values() for budget, _ in points])
    axes.set_ylim(0, highest * 1.06)
    axes.set_xlabel("Task budget, tokens")
    axes.set_ylabel(y_label)
    return figure


def task_share_strip(
    shares: Sequence[float], expected: float | None, arm: str, palette: Palette
) -> Figure:
    """Draw the share of task examples in each window of the training order."""
    figure, axes = new_axes(palette, (4.2, 1.8))
    colour = palette[style_of(arm).colour]
    edges = np.arange(len(shares) + 1)
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(shares, edges, color=colour, linewidth=1.2)
    if expected is not None:
        axes.axhline(expected, color=palette["ink"], linewidth=1.1, dashes=(4, 2))
    axes.set_ylim(0, max([*shares, expected or 0.0, 1e-3]) * 1.25)
    axes.set_xlim(0, len(shares))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_xlabel("Window of the training order")
    axes.set_ylabel("Task share")
    return figure


def loss_heat_map(
    losses: Sequence[Sequence[float]],
    num_task_items: int,
    steps: Sequence[int],
    palette: Palette,
    *,
    loss_range: tuple[float, float],
) -> Figure:
    """Draw the loss of each probe item (row) at each probe (column); dark is high.

    Args:
        losses: Shape (items, probes), in nats per token; task items first.
        num_task_items: How many of the rows are task items.
        steps: Optimiser step of each probe.
        palette: Colours by name.
        loss_range: Losses at the light and the dark end of the scale, in nats per token.
    """
    figure, axes = new_axes(palette, (4.2, 3.2), left=0.3, right=0.35)
    axes.grid(visible=False)
    image = axes.imshow(
        np.asarray(losses, dtype=float), aspect="auto", cmap="viridis_r", vmin=loss_range[0],
        vmax=loss_range[1], interpolation="none",
    )  # fmt: skip
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int))
    axes.set_xticks(ticks, [format_short_tokens(float(steps[tick])) for tick in ticks])
    groups = [("task items", 0, num_task_items), ("general items", num_task_items, len(losses))]
    groups = [group for group in groups if group[2] > group[1]]
    axes.set_yticks([(start + end - 1) / 2 for _, start, end in groups],
                    [name for name, _, _ in groups], rotation=90, va="center")  # fmt: skip
    if len(groups) == 2:
        axes.axhline(num_task_items - 0.5, color="white", linewidth=2.5)
    axes.set_xlabel("Optimiser step")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.035)
    bar.set_label("Loss, nats per token", color=palette["muted"], fontsize=9)
    bar.ax.tick_params(colors=palette["muted"], length=2, labelsize=9)
    bar.outline.set_visible(False)
    return figure


def item_curves(
    items: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
    palette: Palette,
    *,
    columns: int,
) -> Figure:
    """Draw small multiples: loss over steps of single items, one line per arm.

    Args:
        items: Title and, per arm, (step, loss) points of each item.
        palette: Colours by name.
        columns: Panels in a row.
    """
    rows = -(-len(items) // columns)
    width, height = (9.8 if columns > 2 else 4.5), 1.35 * rows + 0.45
    with drawing_settings():
        figure = Figure(figsize=(width, height))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        figure.subplots_adjust(
            left=0.32 / width, right=1 - 0.06 / width, bottom=0.42 / height,
            top=1 - 0.22 / height, wspace=0.1, hspace=0.36,
        )  # fmt: skip
        for axes in grid.flat:
            plain_axes(axes, palette)
            axes.set_visible(False)
        for axes, (title, lines) in zip(grid.flat, items, strict=False):
            axes.set_visible(True)
            _draw_item(axes, title, lines, palette)
        for axes in grid[-1]:
            axes.set_xlabel("Step")
    return figure


def _draw_series(axes: Axes, series: Series, palette: Palette) -> None:
    style = style_of(series.arm)
    colour = palette[style.colour]
    xs = [point.x for point in series.points]
    bands = [
        (point.x, point.low, point.high)
        for point in series.points
        if point.low is not None and point.high is not None
    ]
    if bands:
        where, lows, highs = zip(*bands, strict=True)
        axes.fill_between(where, lows, highs, color=colour, alpha=0.16, linewidth=0)
    for point in series.points:
        axes.plot([point.x] * len(point.seeds), point.seeds, ".", color=colour, alpha=0.45, ms=4)
    axes.plot(
        xs, [point.mean for point in series.points], color=colour, marker=style.marker, ms=5.5,
        markeredgewidth=0, **line_style(style.dashes, style.width),
    )  # fmt: skip


def _draw_level(axes: Axes, level: Level, palette: Palette) -> None:
    style = style_of(level.arm)
    colour = palette[style.colour]
    if level.low is not None and level.high is not None and level.high > level.low:
        axes.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(level.mean, color=colour, **line_style(style.dashes, style.width))


def _draw_reach(axes: Axes, reach: Reach, palette: Palette) -> None:
    axes.annotate(
        "",
        xy=(reach.to_tokens, reach.score),
        xytext=(reach.from_tokens, reach.score),
        arrowprops={
            "arrowstyle": "->" if reach.is_bound else "-|>",
            "color": palette["ink"],
            "linewidth": 1.6,
            "linestyle": (0, (3, 2)) if reach.is_bound else "-",
            "shrinkA": 5,
            "shrinkB": 2,
            "mutation_scale": 14,
        },
    )
    axes.annotate(
        reach.label,
        xy=((reach.from_tokens * reach.to_tokens) ** 0.5, reach.score),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=palette["ink"],
        fontsize=10,
        fontweight="bold",
        bbox={"facecolor": palette["paper"], "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )


def _label_ends(
    axes: Axes, series: Sequence[Series], levels: Sequence[Level], palette: Palette
) -> None:
    """Write each arm's name at the right end of its line, pushed apart where they would touch."""
    ends = [(one.points[-1].mean, one.label, one.arm) for one in series if one.points]
    ends += [(level.mean, level.label, level.arm) for level in levels]
    if not ends:
        return
    low, high = axes.get_ylim()
    heights = push_apart([end[0] for end in ends], (high - low) * 0.062)
    for (_, label, arm), height in zip(ends, heights, strict=True):
        axes.annotate(
            label, xy=(1.0, height), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=palette[style_of(arm).colour],
            fontsize=9.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def push_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights as little as needed until neighbours are ``gap`` apart, order kept."""
    order = np.argsort(heights, kind="stable")
    steps = np.arange(len(heights)) * gap
    ranked = np.asarray(heights, dtype=float)[order] - steps
    blocks: list[list[float]] = []
    for value in ranked:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    fitted = np.concatenate([[np.mean(block)] * len(block) for block in blocks]) + steps
    moved = np.empty(len(heights))
    moved[order] = fitted
    return [float(value) for value in moved]


def _draw_leverage(
    axes: Axes, arm: str, points: Sequence[LeveragePoint], shift: float, palette: Palette
) -> None:
    style = style_of(arm)
    colour = palette[style.colour]
    exact = [point for point in points if not point.bound]
    axes.plot(
        [p.budget_tokens * shift for p in exact], [p.ratio for p in exact], color=colour,
        marker=style.marker, ms=6.5, markeredgewidth=0, **line_style(style.dashes, 1.3),
    )  # fmt: skip
    for point in points:
        x = point.budget_tokens * shift
        if point.bound:
            axes.plot([x], [point.ratio], style.marker, ms=7, mfc="none", color=colour)
        _draw_interval(axes, x, point, colour)


def _draw_interval(axes: Axes, x: float, point: LeveragePoint, colour: str) -> None:
    """Draw a bar to each end of the interval, an arrow where it is unbounded."""
    for end, factor in ((point.low, 1 / 1.7), (point.high, 1.7)):
        if end is not None:
            axes.plot([x, x], [point.ratio, max(end, 1e-3)], color=colour, linewidth=2.0)
            continue
        tip = point.ratio * factor
        axes.annotate(
            "", xy=(x, tip), xytext=(x, point.ratio), annotation_clip=False,
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 4},
        )  # fmt: skip
        axes.plot([x], [tip], alpha=0)  # the axis makes room for the tip


def _draw_item(
    axes: Axes,
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    palette: Palette,
) -> None:
    for arm, points in lines.items():
        style = style_of(arm)
        steps, losses = zip(*points, strict=True)
        axes.plot(
            steps, losses, color=palette[style.colour], marker=style.marker, ms=2.6,
            markeredgewidth=0, **line_style(style.dashes, 1.5),
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=8, loc="left", color=palette["ink"], pad=3)
    axes.tick_params(labelsize=7.5)


def _ratio_axis(axes: Axes) -> None:
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    low, high = min(low, 0.7), max(high, 1.5)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(
        FixedLocator([tick for tick in _RATIO_TICKS if low <= tick <= high])
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
