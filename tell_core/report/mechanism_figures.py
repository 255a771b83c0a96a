"""Drawings behind the predictions: items by general data, survival, times by use, projections."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from tell_core.report.axes import log_token_axis, new_axes
from tell_core.report.figures import PANEL
from tell_core.report.formats import format_short_tokens
from tell_core.report.palette import Palette

Points = Sequence[tuple[float, float]]


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
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
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
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short_tokens(value)))
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
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):  # powers as markup would show as text in an SVG
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
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
