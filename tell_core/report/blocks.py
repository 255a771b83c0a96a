"""The building blocks of the report page: what a section says, apart from how it looks.

Every text here is plain text; the templates escape it. Only ``Chart`` holds markup, and that
comes from our own figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from markupsafe import Markup

from tell_core.report.figure_data import FigureData
from tell_core.report.svg import Draw

MAX_ROWS = 200  # six leverage tables of so many rows take about 1.5 of the page's 5 MB


@dataclass(frozen=True)
class Text:
    """A paragraph. Tone: plain, lead (large), note (small), missing (a part that is not there)."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of short statements."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value, shown as a strip."""

    kind: ClassVar[str] = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Entry:
    """One cell of a table: its text, the exact number behind it, a remark, a share for a bar."""

    text: str
    value: float | None = None
    remark: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table that scrolls inside its box; ``numeric`` names the right-aligned columns."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    numeric: frozenset[str] = frozenset()
    num_omitted: int = 0


@dataclass(frozen=True)
class LegendKey:
    """How one arm is drawn: name of its colour, dashes in points, matplotlib marker.

    Without dashes the line is solid; None is no line. Keys stand in the order of ``place``.
    """

    label: str
    colour: str
    dashes: tuple[float, ...] | None
    marker: str
    is_hollow: bool = False
    place: int = 99


@dataclass(frozen=True)
class Chart:
    """One figure: for the page as inline SVG, and what is needed to write it to files.

    Attributes:
        title: Heading above the figure.
        name: File name without ending, unique in a report; letters, digits and ``._-``.
        svg: The drawing for the page.
        draw: Draws it again with another palette.
        data: The numbers in it.
        alt: What a reader who does not see it is told.
        caption: Text below the figure.
        narrow_svg: A second drawing for narrow screens where one is needed.
        legend: Arms in the figure; panels show one legend for all instead.
    """

    kind: ClassVar[str] = "chart"
    title: str
    name: str
    svg: Markup
    draw: Draw
    data: FigureData
    alt: str
    caption: str = ""
    narrow_svg: Markup | None = None
    legend: tuple[LegendKey, ...] = ()


@dataclass(frozen=True)
class Panels:
    """Several small figures side by side, with one legend for all."""

    kind: ClassVar[str] = "panels"
    charts: tuple[Chart, ...]
    caption: str = ""

    @property
    def legend(self) -> tuple[LegendKey, ...]:
        """Entries of all figures, each once, in their usual order."""
        found = dict.fromkeys(key for chart in self.charts for key in chart.legend)
        return tuple(sorted(found, key=lambda key: key.place))


@dataclass(frozen=True)
class Tokens:
    """One rendered example, token by token; True marks a supervised token."""

    kind: ClassVar[str] = "tokens"
    title: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Answer:
    """What one arm answered to an item, with its score as text; ``style`` is tell or sft."""

    style: str
    label: str
    text: str
    score: str


@dataclass(frozen=True)
class Comparison:
    """One test item, its reference and the answers of several arms."""

    kind: ClassVar[str] = "comparison"
    title: str
    prompt: str
    reference: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Browser:
    """Controls to browse test items, alive only where scripts run; ``sample`` stands in elsewhere.

    Attributes:
        items: What the script reads: see `tell_core.report.pairs.browser_data`.
        sample: Blocks shown where no script runs.
    """

    kind: ClassVar[str] = "browser"
    items: Mapping[str, Any]
    sample: Sequence[Block]


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width box."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Link:
    """A line that begins with a link to another file of the run directory."""

    kind: ClassVar[str] = "link"
    text: str
    path: str
    what: str


@dataclass(frozen=True)
class Fold:
    """Blocks behind a line that opens them."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]
    is_open: bool = False


Block = (
    Text
    | Bullets
    | Facts
    | Table
    | Chart
    | Panels
    | Tokens
    | Comparison
    | Browser
    | Code
    | Link
    | Fold
)


@dataclass(frozen=True)
class Section:
    """One numbered section of the page; ``id`` is its anchor in the table of contents."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def shortened(table: Table, num_rows: int = MAX_ROWS) -> Table:
    """Keep the first rows of a table and say how many more there are."""
    omitted = max(0, len(table.rows) - num_rows)
    return replace(table, rows=table.rows[:num_rows], num_omitted=table.num_omitted + omitted)


def missing(sentence: str) -> Text:
    """Say that a part of the report is not there, and why or how to get it."""
    return Text(sentence, tone="missing")


def charts_of(blocks: Sequence[Block]) -> Iterator[Chart]:
    """Yield every figure among some blocks, those inside folds and panels too."""
    for block in blocks:
        if isinstance(block, Chart):
            yield block
        elif isinstance(block, Panels):
            yield from block.charts
        elif isinstance(block, Fold):
            yield from charts_of(block.blocks)
