"""Axes as every figure of the report has them: no frame, quiet grid, budgets as ticks."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tell_core.report.formats import format_short_tokens
from tell_core.report.palette import Palette
from tell_core.report.svg import drawing_settings

Size = tuple[float, float]


def new_axes(
    palette: Palette, size: Size, *, left: float = 0.6, right: float = 0.1
) -> tuple[Figure, Axes]:
    """Make axes with fixed margins in inches: a layout engine takes twice the time."""
    width, height = size
    with drawing_settings():
        figure = Figure(figsize=size)
        figure.subplots_adjust(
            left=left / width, right=1 - right / width, bottom=0.45 / height, top=1 - 0.12 / height
        )
        axes = figure.add_subplot()
    plain_axes(axes, palette)
    return figure, axes


def plain_axes(axes: Axes, palette: Palette) -> None:
    """Take the frame away and put a quiet grid behind the data."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette["muted"])
    axes.tick_params(which="both", colors=palette["muted"], length=3)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set_color(palette["muted"])
    axes.yaxis.label.set_color(palette["muted"])
    axes.grid(axis="y", color=palette["grid"], linewidth=0.8)
    axes.set_axisbelow(True)


def line_style(dashes: tuple[float, ...], width: float) -> dict[str, Any]:
    """Return matplotlib's arguments for a line of given dashes and width in points."""
    return {"linewidth": width, "linestyle": (0, dashes) if dashes else "-"}


def log_token_axis(axes: Axes, tokens: Sequence[float]) -> None:
    """Put ticks at the budgets themselves, leaving out those that would touch."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    ticks: list[float] = []
    spread = max(tokens) / min(tokens) if tokens else 1.0
    for value in sorted(set(tokens)):
        if not ticks or value / ticks[-1] >= spread ** (1 / 11) + 1e-9:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
