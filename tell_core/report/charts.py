"""From a drawing to a figure of the report: name, title, data and a text alternative together."""

from collections.abc import Iterable, Mapping, Sequence

from tell_core.report.blocks import Chart, LegendKey
from tell_core.report.curves import arm_label, arm_place
from tell_core.report.figure_data import FigureData
from tell_core.report.figures import Level, LeveragePoint, Series
from tell_core.report.formats import format_count, format_ratio, format_score
from tell_core.report.palette import style_of
from tell_core.report.svg import Draw, to_svg


def make_chart(
    title: str,
    name: str,
    draw: Draw,
    data: FigureData,
    alt: str,
    *,
    narrow: Draw | None = None,
    caption: str = "",
    legend: tuple[LegendKey, ...] = (),
) -> Chart:
    """Draw a figure for the page and keep with it what its files are made from.

    Args:
        title: Heading above the figure.
        name: Name of its files; what is not a letter, digit or ``._-`` becomes a hyphen.
        draw: Draws it for wide screens and for files.
        data: The numbers in it.
        alt: What a reader who does not see it is told, after the title.
        narrow: Draws it for narrow screens, where the wide drawing would be too small.
        caption: Text below.
        legend: Arms in it.
    """
    slug = slug_of(name)
    return Chart(
        title=title,
        name=slug,
        svg=to_svg(draw, slug),
        draw=draw,
        data=data,
        alt=f"{title}. {alt}",
        caption=caption,
        narrow_svg=None if narrow is None else to_svg(narrow, f"{slug}-narrow"),
        legend=legend,
    )


def slug_of(name: str) -> str:
    """Return a name that is safe in file names and ids."""
    return "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-"
        for letter in name
    )


def legend_of(arms: Iterable[str]) -> tuple[LegendKey, ...]:
    """Return the legend entries of some arms, each once, in their usual order."""
    keys = []
    for arm in sorted(set(arms), key=arm_place):
        style = style_of(arm)
        dashes = tuple(length * style.width for length in style.dashes)
        label = arm_label(arm)
        keys.append(LegendKey(label, style.colour, dashes, style.marker, place=style.place))
    return tuple(keys)


def describe_curves(
    series: Sequence[Series], levels: Sequence[Level] = (), unit: str = "task tokens"
) -> str:
    """Say in words where each curve begins and ends."""
    parts = []
    for one in series:
        first, last = one.points[0], one.points[-1]
        begin = f"{one.label}: {format_score(first.mean)} at {format_count(first.x)} {unit}"
        end = f", {format_score(last.mean)} at {format_count(last.x)}" if last is not first else ""
        parts.append(begin + end)
    parts += [f"{level.label}: {format_score(level.mean)} throughout" for level in levels]
    return f"{'; '.join(parts)}."


def describe_leverage(lines: Mapping[str, Sequence[LeveragePoint]]) -> str:
    """Say every leverage ratio or bound in words."""
    signs = {"above": "at least ", "below": "at most "}
    parts = []
    for arm, points in lines.items():
        ratios = ", ".join(
            f"{signs.get(point.bound, '')}{format_ratio(point.ratio)} at "
            f"{format_count(point.budget_tokens)}"
            for point in points
        )
        parts.append(f"{arm_label(arm)}: {ratios} task tokens")
    return f"{'; '.join(parts)}."


def describe_lines(lines: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> str:
    """Say in words where each plain line begins and ends."""
    parts = [
        f"{arm_label(arm)}: {format_score(points[0][1])} at {unit} {format_count(points[0][0])}, "
        f"{format_score(points[-1][1])} at {format_count(points[-1][0])}"
        for arm, points in lines.items()
    ]
    return f"{'; '.join(parts)}."
