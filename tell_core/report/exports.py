"""Every figure of the report as files: SVG, PNG, and its numbers as CSV."""

import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tell_core.report.blocks import Chart, LegendKey
from tell_core.report.palette import Palette
from tell_core.report.svg import drawing_settings, to_png, to_standalone_svg
from tell_core.store import explain_disk_errors

_LINE_INCHES = 0.21
_KEY_INCHES = 1.75
_TITLE_CHARACTERS_PER_INCH = 13


def write_figure_files(charts: Iterable[Chart], out_dir: Path) -> None:
    """Replace ``out_dir`` by the files of some figures: ``<name>.svg``, ``.png`` and ``.csv``.

    Each carries its title and legend. The SVG follows the reader's light or dark theme; the PNG is
    on light paper. The old directory stays until the new one is complete.

    Raises:
        StoreError: The directory cannot be written.
    """
    aside = out_dir.with_name(f".{out_dir.name}.partial")
    with explain_disk_errors(out_dir):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for chart in charts:
            _write_figure(chart, aside)
        shutil.rmtree(out_dir, ignore_errors=True)
        aside.rename(out_dir)


def draw_headed(chart: Chart, palette: Palette) -> Figure:
    """Draw a figure with its title and legend above, as it stands alone."""
    figure = chart.draw(palette)
    width = float(figure.get_size_inches()[0])
    title = textwrap.wrap(chart.title, int(width * _TITLE_CHARACTERS_PER_INCH))
    columns = max(1, int((width - 0.1) / _KEY_INCHES))
    num_rows = len(title) + math.ceil(len(chart.legend) / columns)
    _make_room(figure, num_rows * _LINE_INCHES + 0.12)
    _write_heading(figure, title, chart.legend, columns, palette)
    return figure


def _write_figure(chart: Chart, out_dir: Path) -> None:
    draw = partial(draw_headed, chart)
    svg = to_standalone_svg(draw, chart.name, chart.alt)
    (out_dir / f"{chart.name}.svg").write_text(svg, encoding="utf-8")
    (out_dir / f"{chart.name}.png").write_bytes(to_png(draw))
    (out_dir / f"{chart.name}.csv").write_bytes(chart.data.to_csv().encode())


def _make_room(figure: Figure, inches: float) -> None:
    """Make a figure higher at its top, everything in it keeping its size."""
    width, height = figure.get_size_inches()
    places = [(axes, axes.get_position(original=True)) for axes in figure.axes]
    figure.set_size_inches(width, height + inches)
    factor = height / (height + inches)
    for axes, place in places:
        axes.set_position((place.x0, place.y0 * factor, place.width, place.height * factor))


def _write_heading(
    figure: Figure,
    title: Sequence[str],
    legend: Sequence[LegendKey],
    columns: int,
    palette: Palette,
) -> None:
    width, height = figure.get_size_inches()
    with drawing_settings():
        figure.text(
            0.1 / width, 1 - 0.08 / height, "\n".join(title), va="top", ha="left", fontsize=10,
            fontweight="bold", color=palette["ink"],
        )  # fmt: skip
        if legend:
            top = 1 - (0.06 + len(title) * _LINE_INCHES) / height
            figure.legend(
                handles=[_handle(key, palette) for key in legend], loc="upper left",
                bbox_to_anchor=(0.09 / width, top), ncols=min(columns, len(legend)), frameon=False,
                labelcolor=palette["ink"], fontsize=9, borderaxespad=0.0, borderpad=0.1,
                handlelength=2.6, columnspacing=1.4, labelspacing=0.35,
            )  # fmt: skip


def _handle(key: LegendKey, palette: Palette) -> Line2D:
    colour = palette[key.colour]
    handle = Line2D(
        [], [], color=colour, linewidth=2.0, marker=key.marker, markersize=5.5,
        markerfacecolor="none" if key.is_hollow else colour, markeredgewidth=float(key.is_hollow),
        label=key.label,
    )  # fmt: skip
    if key.dashes is None:
        handle.set_linestyle("none")
    elif key.dashes:
        handle.set_linestyle((0, tuple(length / 2 for length in key.dashes)))
    return handle
