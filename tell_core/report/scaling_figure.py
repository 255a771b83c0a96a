"""Log-log drawings of scaling: measured losses, fitted power laws, the finite-K curve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tell_core.report.axes import line_style, log_token_axis, new_axes
from tell_core.report.figures import PANEL, Point
from tell_core.report.palette import Palette, style_of

_NUM_CURVE = 60
_DOTS = (1.0, 1.8)


@dataclass(frozen=True)
class ScalingCurve:
    """One arm: its points and its power law: offset, amplitude and exponent.

    Attributes:
        arm: Name of the arm.
        points: Means with intervals over seeds, by rising x.
        law: The fitted power law, or None.
        is_claimed: Whether it may be called a power law; else it is dotted.
    """

    arm: str
    points: tuple[Point, ...]
    law: tuple[float, float, float] | None
    is_claimed: bool


def scaling_curves(
    curves: Sequence[ScalingCurve], palette: Palette, *, x_label: str, y_label: str
) -> Figure:
    """Draw losses by scale, both axes logarithmic."""
    figure, axes = new_axes(palette, PANEL)
    for curve in curves:
        _draw_points(axes, curve, palette)
        if curve.law is not None:
            _draw_law(axes, curve, curve.law, palette)
    points = [point for curve in curves for point in curve.points]
    means = [point.mean for point in points]
    _log_axes(axes, [point.x for point in points], min(means), max(means))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure


def finite_k_curve(
    arm: str, rows: Sequence[tuple[float, float, float]], palette: Palette
) -> Figure:
    """Draw (x, measured, predicted) of one arm, both axes logarithmic; dashed: predicted."""
    figure, axes = new_axes(palette, PANEL)
    style = style_of(arm)
    xs, measured, predicted = zip(*rows, strict=True)
    axes.plot(
        xs, measured, style.marker, color=palette[style.colour], ms=5.5, markeredgewidth=0,
        label="measured",
    )  # fmt: skip
    axes.plot(
        xs, predicted, color=palette["ink"], label="finite K, predicted", **line_style((5, 2), 1.4)
    )
    _log_axes(axes, xs, min(*measured, *predicted), max(*measured, *predicted))
    axes.set_xlabel("Optimiser step + 1")
    axes.set_ylabel("Nats per token")
    axes.legend(frameon=False, labelcolor=palette["ink"], loc="lower left")
    return figure


def _draw_points(axes: Axes, curve: ScalingCurve, palette: Palette) -> None:
    style = style_of(curve.arm)
    colour = palette[style.colour]
    for point in curve.points:
        if point.low is not None and point.high is not None:
            low = max(point.low, point.mean / 10)  # at or below 0 there is no place on the axis
            axes.plot([point.x, point.x], [low, point.high], color=colour, linewidth=1.2, alpha=0.6)
    axes.plot(
        [point.x for point in curve.points], [point.mean for point in curve.points], style.marker,
        color=colour, ms=5, markeredgewidth=0,
    )  # fmt: skip


def _draw_law(
    axes: Axes, curve: ScalingCurve, law: tuple[float, float, float], palette: Palette
) -> None:
    offset, amplitude, exponent = law
    xs = np.geomspace(curve.points[0].x, curve.points[-1].x, _NUM_CURVE)
    ys = offset + amplitude * xs**-exponent  # above 0: it falls, to an offset of at least 0
    dashes = () if curve.is_claimed else _DOTS
    colour = palette[style_of(curve.arm).colour]
    axes.plot(xs, ys, color=colour, **line_style(dashes, 1.4))


def _log_axes(axes: Axes, xs: Sequence[float], low: float, high: float) -> None:
    """Logarithmic axes with plain numbers: powers as markup would show as text in an SVG."""
    log_token_axis(axes, xs)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
