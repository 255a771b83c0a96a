"""Drawings: labels that do not touch, text that stays text, bounds as arrows."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from tell_core.report.axes import new_axes
from tell_core.report.figures import (
    Level,
    LeveragePoint,
    Point,
    Reach,
    Series,
    item_curves,
    learning_curves,
    leverage_by_budget,
    loss_heat_map,
    push_apart,
)
from tell_core.report.palette import COLOURS, LIGHT, Palette, style_of
from tell_core.report.svg import keep_label_inside, to_png, to_standalone_svg, to_svg

ARMS = (
    "tell", "sft", "sft_matched", "tell_no_anchor", "tell_random_anchor", "tell_anchor_all",
    "tell_task_first", "tell_task_last", "tell_blocks(4)", "general_only", "base_few_shot", "base",
)  # fmt: skip
HEIGHTS = st.lists(st.floats(min_value=-1e3, max_value=1e3), min_size=1, max_size=12)


@given(HEIGHTS, st.floats(min_value=1e-3, max_value=10))
def test_pushed_labels_do_not_touch_and_keep_their_order(heights: list[float], gap: float) -> None:
    moved = push_apart(heights, gap)

    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.asarray(moved)[order]) >= gap * (1 - 1e-6) - 1e-9).all()


@given(HEIGHTS)
def test_labels_with_room_stay_where_they_are(heights: list[float]) -> None:
    spread = sorted({round(height) * 10.0 for height in heights})

    assert np.allclose(push_apart(spread, 1.0), spread)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.floats(min_value=0.1, max_value=9))
def test_the_y_label_stays_inside_however_wide_the_numbers(digits: int, step: float) -> None:
    figure, axes = new_axes(LIGHT, (4.2, 3.2))
    axes.plot([0, 1], [-(10.0**digits), -(10.0**digits) + step / 100])
    axes.set_ylabel("Log-probability of the reference, nats per token")

    keep_label_inside(figure)

    box = axes.yaxis.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert box is not None
    assert box.x0 >= 0


def test_arms_differ_without_colour() -> None:
    looks = [(style_of(arm).dashes, style_of(arm).marker) for arm in ARMS]

    assert len(set(looks)) == len(looks)


def test_arm_colours_read_on_light_and_dark_paper() -> None:
    names = {style_of(arm).colour for arm in ARMS} | {"ink", "muted"}

    for theme in (0, 1):
        paper = _luminance(COLOURS["paper"][theme])
        for name in names:
            colour = _luminance(COLOURS[name][theme])
            contrast = (max(colour, paper) + 0.05) / (min(colour, paper) + 0.05)
            assert contrast >= 4.5, (name, theme, contrast)


def test_text_in_a_drawing_stays_text_and_is_escaped() -> None:
    lines = {"tell": [(0.0, 2.0), (8.0, 1.0)]}

    svg = to_svg(lambda palette: item_curves([("<b>$x$ & y", lines)], palette, columns=1), "one")

    assert "&lt;b&gt;$x$ &amp; y</text>" in svg
    assert "var(--sans)" in svg
    assert "DejaVu" not in svg


def test_equal_drawings_give_equal_svg_and_names_keep_ids_apart() -> None:
    first, again, other = (to_svg(_curves, name) for name in ("a", "a", "b"))

    assert first == again
    assert not set(re.findall(r'id="([^"]+)"', first)) & set(re.findall(r'id="([^"]+)"', other))


def test_a_standalone_svg_carries_both_themes() -> None:
    svg = to_standalone_svg(_curves, "main")

    assert svg.startswith("<svg viewBox=")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg.split(">", 1)[0]
    assert COLOURS["tell"][0] in svg
    assert COLOURS["tell"][1] in svg


def test_a_png_is_on_light_paper() -> None:
    assert to_png(_curves, dots_per_inch=40).startswith(b"\x89PNG")


def test_only_bounds_and_unbounded_intervals_have_arrows() -> None:
    points = [
        LeveragePoint(1_000, 4.0, 3.0, 5.0, ""),
        LeveragePoint(4_000, 4.0, 3.0, None, ""),
        LeveragePoint(16_000, 2.0, 1.5, None, "above"),
        LeveragePoint(64_000, 0.5, None, 0.6, "below"),
        LeveragePoint(256_000, 0.6, None, None, ""),
    ]

    figure = leverage_by_budget({"tell": points}, LIGHT)

    arrows = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    directions = [np.sign(arrow.xy[1] - arrow.xyann[1]) for arrow in arrows]
    assert directions == [1, 1, -1, -1, 1]


def test_token_axis_has_its_ticks_at_the_budgets() -> None:
    axes = _curves(LIGHT).axes[0]

    assert list(axes.get_xticks()) == [1_000, 4_000, 16_000]


def test_heat_map_leaves_out_what_was_not_measured() -> None:
    losses = [[2.0, 1.0], [float("nan"), 0.5]]

    figure = loss_heat_map(losses, 1, [0, 8], LIGHT, loss_range=(0.0, 2.0))

    assert np.ma.count(figure.axes[0].images[0].get_array()) == 3


def _curves(palette: Palette) -> Figure:
    points = tuple(Point(x, -1 / x, -1.1 / x, -0.9 / x, (-1 / x,)) for x in (1e3, 4e3, 16e3))
    return learning_curves(
        [Series("tell", "TELL", points)],
        [Level("base", "base", -0.002)],
        palette,
        reach=Reach(1e3, 4e3, -0.001, "4.0×", is_bound=False),
        has_labels=True,
    )


def _luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
