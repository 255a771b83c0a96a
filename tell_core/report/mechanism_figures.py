"""Drawings behind the predictions and of the Q sequence, without the text around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tell_core.report.axes import log_token_axis, new_axes
from tell_core.report.figures import PANEL
from tell_core.report.formats import format_short_tokens
from tell_core.report.palette import Palette

Points = Sequence[tuple[float, float]]
_MANY_DECADES = 1e3

# Colour, marker and words of the groups of units, in the order of legends.
GROUP_LOOKS: Mapping[str, tuple[str, str, str]] = {
    "shared": ("general", "o", "shared with general data"),
    "specific": ("violet", "D", "specific to the task"),
    "neither": ("muted", "s", "learned by neither control"),
    "unknown": ("tell", "^", "no split registered"),
}


@dataclass(frozen=True)
class SequenceRow:
    """One unit of a learning order, as sequence.json has it; steps are optimiser steps."""

    unit: str
    group: str
    rank: float
    low: float | None
    high: float | None
    learned_share: float
    step: float
    step_low: float | None
    step_high: float | None

    @property
    def is_censored(self) -> bool:
        """Whether at least one training does not learn it."""
        return self.learned_share < 1


def items_by_general_data(
    steps: Sequence[Points], others: Sequence[Points], palette: Palette
) -> Figure:
    """Draw (general tokens, loss) of single items, those that step over the others."""
    figure, axes = new_axes(palette, PANEL)
    for lines, colour, width in ((others, "muted", 0.7), (steps, "tell", 1.3)):
        for points in lines:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=palette[colour], linewidth=width, alpha=0.6)
    log_token_axis(axes, [x for points in (*steps, *others) for x, _ in points])
    axes.set_xlabel("General tokens")
    axes.set_ylabel("Nats per token")
    return figure


def survival_curves(curves: Mapping[str, Points], palette: Palette) -> Figure:
    """Draw the share of units not yet learned by step, a dashed line for specific units."""
    figure, axes = new_axes(palette, PANEL)
    looks = {"shared": ("general", "-"), "specific": ("violet", "--")}
    for name, points in curves.items():
        colour, line = looks[name]
        xs, ys = zip(*((1 + step, share) for step, share in points), strict=True)
        axes.step(xs, ys, where="post", color=palette[colour], linestyle=line, label=name)
    _log_scale(axes, axes.xaxis)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("Optimiser step + 1")
    axes.set_ylabel("Share not yet learned")
    axes.legend(frameon=False, labelcolor=palette["ink"])
    return figure


def cosines_by_step(curves: Mapping[str, Points], palette: Palette) -> Figure:
    """Draw (step, cosine) of shared and specific units, a dashed line for specific ones."""
    figure, axes = new_axes(palette, PANEL)
    looks = {"shared": ("general", "-"), "specific": ("violet", "--")}
    for name, points in curves.items():
        colour, line = looks[name]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=palette[colour], linestyle=line, marker=".", label=name)
    axes.axhline(0, color=palette["muted"], linewidth=0.7)
    _log_scale(axes, axes.xaxis)
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel("Cosine")
    axes.legend(frameon=False, labelcolor=palette["ink"])
    return figure


def times_by_frequency(learned: Points, censored: Points, palette: Palette) -> Figure:
    """Draw (use frequency, step + 1), both logarithmic; hollow where it was not learned."""
    figure, axes = new_axes(palette, PANEL)
    for points, face in ((learned, palette["tell"]), (censored, "none")):
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=22, facecolors=face, edgecolors=palette["tell"], alpha=0.6)
    _log_scale(axes, axes.xaxis)
    _log_scale(axes, axes.yaxis)
    axes.set_xlabel("Use frequency in general data")
    axes.set_ylabel("Step + 1 at which it is learned")
    return figure


def state_projection(task: Points, general: Points, palette: Palette) -> Figure:
    """Draw hidden states in two dimensions, task and general data apart by colour and marker."""
    figure, axes = new_axes(palette, PANEL)
    for points, colour, marker in ((general, "general", "^"), (task, "tell", "o")):
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, s=20, color=palette[colour], marker=marker, alpha=0.75)
    axes.set_xlabel("First principal component")
    axes.set_ylabel("Second")
    return figure


def differences(
    rows: Sequence[tuple[str, float, float | None, float | None]], palette: Palette
) -> Figure:
    """Draw (label, difference, low, high) below one another, with a line at no difference."""
    figure, axes = new_axes(palette, (PANEL[0], 0.9 + 0.4 * len(rows)))
    axes.grid(visible=False)
    axes.axvline(0, color=palette["ink"], linewidth=1.1)
    for place, (_, mean, low, high) in enumerate(rows):
        ends = [mean if low is None else low, mean if high is None else high]
        axes.plot(ends, [place, place], color=palette["tell"], linewidth=2)
        axes.plot([mean], [place], "o", color=palette["tell"], markersize=6.5, markeredgewidth=0)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlabel("TELL minus ordered data, nats per token")
    return figure


def learning_timeline(
    rows: Sequence[tuple[int, SequenceRow]], last_step: float, palette: Palette
) -> Figure:
    """Draw units by step of learning, one below the other, with intervals over seeds.

    Args:
        rows: Place of each unit from the top, and the unit.
        last_step: Last step of the training, where what is not learned is censored.
        palette: Colours by name.
    """
    figure, axes = new_axes(palette, (PANEL[0], 4.6))
    axes.axvline(1 + last_step, color=palette["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    for group, (name, marker, _) in GROUP_LOOKS.items():
        mine = [(place, row) for place, row in rows if row.group == group]
        known = [(place, row) for place, row in mine if row.step_low is not None]
        axes.hlines(
            [place for place, _ in known],
            [1 + (row.step_low or 0) for _, row in known],
            [1 + min(last_step, last_step if row.step_high is None else row.step_high)
             for _, row in known],
            color=palette[name], linewidth=0.8, alpha=0.45,
        )  # fmt: skip
        for is_censored in (False, True):
            found = [(place, row) for place, row in mine if row.is_censored is is_censored]
            axes.scatter(
                [1 + row.step for _, row in found],
                [place for place, _ in found],
                s=14,
                marker=marker,
                facecolors="none" if is_censored else palette[name],
                edgecolors=palette[name],
                linewidths=0.8,
            )
    _log_scale(axes, axes.xaxis)
    axes.set_xlim(1, 1.15 * (1 + last_step))
    axes.set_ylim(max((place for place, _ in rows), default=1) + 1, 0)
    axes.set_xlabel("Optimiser step + 1 at which it is learned")
    axes.set_ylabel("Place in the order")
    return figure


def _log_scale(axes: Axes, axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2, 5, 10, ... or, over decades, 1, 10."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high / low < _MANY_DECADES else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
    axis.set_minor_formatter(NullFormatter())  # powers as markup would show as text in an SVG
