"""The figure of a forecast: what was measured, where the curve may go, how well it was tested."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation, Transform

from tell_core.report.axes import Size, line_style, log_token_axis, new_axes
from tell_core.report.figures import PANEL, Point, push_apart
from tell_core.report.palette import Palette, style_of

COVERED_MARKER = "D"
MISSED_MARKER = "X"
_SHIFT_POINTS = 8.0  # a back-test stands so far right of the measured point it is about
_MAX_LABEL = 52


@dataclass(frozen=True)
class BackTest:
    """A forecast of a budget that was then looked at.

    Attributes:
        x: Task tokens of the budget.
        observed: Score measured there.
        predicted: Score forecast from smaller budgets.
        low: Lower end of the forecast's interval.
        high: Upper end.
        is_covered: Whether the observed score lies in the interval.
    """

    x: float
    observed: float
    predicted: float
    low: float
    high: float
    is_covered: bool


@dataclass(frozen=True)
class ForecastCurve:
    """One arm's forecast; ``targets`` are pairs of a label and a score."""

    arm: str
    measured: tuple[Point, ...]
    band: tuple[Point, ...]
    backtests: tuple[BackTest, ...] = ()
    targets: tuple[tuple[str, float], ...] = ()


def forecast_curve(
    curve: ForecastCurve, palette: Palette, *, y_label: str, size: Size = PANEL
) -> Figure:
    """Draw measured scores, the band up to the horizon, back-tests and target scores."""
    figure, axes = new_axes(palette, size)
    last = max((point.x for point in curve.measured), default=0.0)
    _draw_band(axes, curve, last, palette)
    _draw_measured(axes, curve, palette)
    ends = [point.x for point in curve.band[-1:]]
    log_token_axis(axes, [*(point.x for point in curve.measured), *ends])
    for test, place in _side_by_side(curve.backtests):
        shift = ScaledTranslation(place * _SHIFT_POINTS / 72, 0, figure.dpi_scale_trans)
        _draw_backtest(axes, test, shift, palette)
    if curve.targets:
        _draw_targets(axes, curve.targets, palette)
    if ends and last and ends[0] > last:
        _mark_beginning(axes, last, palette)
    axes.set_xlabel("Task tokens")
    axes.set_ylabel(y_label)
    return figure


def _draw_band(axes: Axes, curve: ForecastCurve, last: float, palette: Palette) -> None:
    """Shade the interval; the middle is solid where measured and dashed where forecast."""
    colour = palette[style_of(curve.arm).colour]
    bounded = [(p.x, p.low, p.high) for p in curve.band if p.low is not None and p.high is not None]
    if bounded:
        xs, lows, highs = zip(*bounded, strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
        for edge in (lows, highs):
            axes.plot(xs, edge, color=colour, alpha=0.6, **line_style((1, 1.5), 0.8))
    inside = [(point.x, point.mean) for point in curve.band if point.x <= last]
    beyond = [*inside[-1:], *((point.x, point.mean) for point in curve.band if point.x > last)]
    for part, dashes in ((inside, ()), (beyond, (5.0, 2.0))):
        if len(part) > 1:
            axes.plot(*zip(*part, strict=True), color=colour, **line_style(dashes, 1.6))


def _draw_measured(axes: Axes, curve: ForecastCurve, palette: Palette) -> None:
    style = style_of(curve.arm)
    colour = palette[style.colour]
    for point in curve.measured:
        if point.low is not None and point.high is not None:
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1.6)
    axes.plot(
        [point.x for point in curve.measured], [point.mean for point in curve.measured],
        style.marker, color=colour, ms=7, markeredgewidth=0,
    )  # fmt: skip


def _side_by_side(tests: Sequence[BackTest]) -> list[tuple[BackTest, int]]:
    """Give every back-test of one budget a place of its own, right of the measured point."""
    seen: dict[float, int] = {}
    placed = []
    for test in tests:
        seen[test.x] = seen.get(test.x, 0) + 1
        placed.append((test, seen[test.x]))
    return placed


def _draw_backtest(axes: Axes, test: BackTest, shift: Transform, palette: Palette) -> None:
    ink = palette["ink"]
    beside = axes.transData + shift
    axes.plot(
        [test.x, test.x], [test.low, test.high], "_-", color=ink, linewidth=1.0, ms=5,
        transform=beside,
    )  # fmt: skip
    marker = COVERED_MARKER if test.is_covered else MISSED_MARKER
    face = "none" if test.is_covered else ink
    axes.plot(
        [test.x], [test.predicted], marker, ms=5, mfc=face, mec=ink, mew=0.9, transform=beside
    )


def _draw_targets(axes: Axes, targets: Sequence[tuple[str, float]], palette: Palette) -> None:
    """Draw target scores as lines, their labels above them and pushed apart."""
    for _, score in targets:
        axes.axhline(score, color=palette["ink"], **line_style((1.5, 1.5), 0.9))
    low, high = axes.get_ylim()
    heights = push_apart([score for _, score in targets], (high - low) * 0.065)
    for (label, _), height in zip(targets, heights, strict=True):
        axes.annotate(
            shorten(label, _MAX_LABEL, placeholder=" …"), xy=(0.0, height),
            xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
            ha="left", va="bottom", fontsize=8, color=palette["ink"],
        )  # fmt: skip


def _mark_beginning(axes: Axes, last: float, palette: Palette) -> None:
    """Draw the line right of which nothing was measured."""
    axes.axvline(last, color=palette["muted"], **line_style((1, 2), 1.0))
    axes.annotate(
        "forecast →", xy=(last, 0.0), xycoords=("data", "axes fraction"), xytext=(4, 3),
        textcoords="offset points", ha="left", va="bottom", fontsize=8, color=palette["muted"],
    )  # fmt: skip
