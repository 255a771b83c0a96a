"""Figures as files: every figure thrice, data that read back, headings that fit."""

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tell_core.errors import StoreError
from tell_core.report import write_report
from tell_core.report.blocks import Chart
from tell_core.report.charts import legend_of, make_chart, slug_of
from tell_core.report.exports import draw_headed, write_figure_files
from tell_core.report.figure_data import (
    FigureData,
    curve_data,
    forecast_data,
    heat_data,
    leverage_data,
)
from tell_core.report.figures import Level, LeveragePoint, Point, Series, learning_curves
from tell_core.report.forecast_figure import BackTest, ForecastCurve
from tell_core.report.palette import LIGHT, MARKER_PATHS, Palette
from tests.tell_core.report.conftest import RunPlan, write_run

FINITE = st.floats(min_value=-1e300, max_value=1e300)
FIELDS = st.one_of(st.none(), st.integers(), FINITE, st.text(st.characters(categories=["L", "P"])))
POINTS = (Point(1e3, -2.0, -2.2, -1.8, (-2.1, -1.9)), Point(4e3, -1.0, None, None, (-1.0,)))


@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=8))
def test_data_read_back_from_csv(rows: list[tuple[str | float | None, ...]]) -> None:
    text = FigureData(("a", "b"), tuple(rows)).to_csv()

    read = list(csv.reader(io.StringIO(text, newline="")))
    assert read[0] == ["a", "b"]
    assert len(read) == len(rows) + 1
    for fields, row in zip(read[1:], rows, strict=True):
        for field, value in zip(fields, row, strict=True):
            if isinstance(value, float):
                assert float(field) == pytest.approx(value, rel=1e-9)
            else:
                assert field == ("" if value is None else str(value))


@given(st.text())
def test_file_names_are_safe_everywhere(name: str) -> None:
    assert set(slug_of(name)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
    )
    assert len(slug_of(name)) == len(name)


def test_curves_keep_every_seed_and_levels_have_no_tokens() -> None:
    data = curve_data([Series("tell", "TELL", POINTS)], [Level("base", "base", -3.0)])

    assert data.columns[-2:] == ("seed_score_1", "seed_score_2")
    assert data.rows == (
        ("tell", 1e3, -2.0, -2.2, -1.8, -2.1, -1.9),
        ("tell", 4e3, -1.0, None, None, -1.0, None),
        ("base", None, -3.0, None, None, None, None),
    )


def test_a_bound_is_named_in_the_data() -> None:
    data = leverage_data({"tell": [LeveragePoint(1e3, 4.0, 3.0, None, "above")]})

    assert data.rows == (("tell", 1e3, 4.0, 3.0, None, "above"),)


def test_forecasts_keep_measured_forecast_and_backtest_apart() -> None:
    test = BackTest(4e3, -1.0, -0.9, -1.1, -0.8, is_covered=True)

    data = forecast_data(ForecastCurve("tell", POINTS, POINTS, (test,)))

    assert [row[0] for row in data.rows] == ["measured"] * 2 + ["forecast"] * 2 + ["back-test"]
    assert data.rows[-1][-1] == -1.0


def test_what_was_not_measured_is_an_empty_field() -> None:
    data = heat_data([("task", "a")], [[2.0, float("nan")]], [0, 8])

    assert data.rows == (("task", "a", 2.0, None),)


def test_a_headed_figure_keeps_the_size_of_its_drawing() -> None:
    chart = _chart()
    plain, headed = chart.draw(LIGHT), draw_headed(chart, LIGHT)

    (width, height), (new_width, new_height) = (
        figure.get_size_inches() for figure in (plain, headed)
    )
    before, after = (figure.axes[0].get_position() for figure in (plain, headed))
    assert (new_width, after.width) == (width, pytest.approx(before.width))
    assert after.height * new_height == pytest.approx(before.height * height)
    assert after.y1 * new_height == pytest.approx(before.y1 * height)
    labels = [text.get_text() for text in headed.legends[0].get_texts()]
    assert labels == ["TELL", "SFT", "base"]


def test_old_figures_go_and_new_ones_are_complete(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    out.mkdir()
    (out / "gone.svg").write_text("old")

    write_figure_files([_chart()], out)

    assert {path.name for path in out.iterdir()} == {"curve-a-b.svg", "curve-a-b.png",
                                                     "curve-a-b.csv"}  # fmt: skip
    svg = ElementTree.fromstring((out / "curve-a-b.svg").read_text(encoding="utf-8"))
    assert svg.findtext("{http://www.w3.org/2000/svg}title") == "One & two. In <words>."
    assert (out / "curve-a-b.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curve-a-b.csv").read_bytes() == _chart().data.to_csv().encode()


def test_a_failure_leaves_the_old_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    out.mkdir()
    (out / "kept.svg").write_text("old")

    def no_room(palette: Palette) -> Figure:
        raise OSError(28, "No space left on device")

    chart = _chart()
    broken = Chart(chart.title, chart.name, chart.svg, no_room, chart.data, chart.alt)
    with pytest.raises(StoreError):
        write_figure_files([broken], out)

    assert (out / "kept.svg").read_text() == "old"


def test_every_figure_of_a_report_is_written_thrice(tmp_path: Path) -> None:
    plan = RunPlan(seeds=(0, 1), general_budgets=(60_000,), task_budgets=(1_000, 16_000),
                   without=frozenset({"emergence", "forecast"}))  # fmt: skip
    run = write_run(tmp_path / "run", plan)

    page = write_report(run).read_text(encoding="utf-8")

    files = {path.name for path in (run / "figures").iterdir()}
    names = {name.rsplit(".", 1)[0] for name in files}
    assert {f"{name}.{ending}" for name in names for ending in ("svg", "png", "csv")} == files
    assert names == {part.split('"')[0] for part in page.split('data-figure="')[1:]}
    assert "learning_curves" in names


def test_every_marker_has_a_path_for_the_legend() -> None:
    arms = ["tell", "sft", "sft_matched", "tell_blocks(2)", "general_only", "base", "other"]

    assert all(key.marker in MARKER_PATHS for key in legend_of(arms))


def _chart() -> Chart:
    series = [Series("tell", "TELL", POINTS), Series("sft", "SFT", POINTS)]
    return make_chart(
        "One & two",
        "curve-a/b",
        lambda palette: learning_curves(series, (), palette),
        curve_data(series, ()),
        "In <words>.",
        legend=legend_of(["tell", "sft", "base"]),
    )
