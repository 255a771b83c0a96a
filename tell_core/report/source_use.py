"""What each cell took of each source, and the way to the page of the curated corpora."""

from collections.abc import Iterator, Sequence

from tell_core.report.blocks import Entry, Fold, Link, Table
from tell_core.report.emergence import cell_title
from tell_core.report.formats import MISSING, as_number, format_count
from tell_core.report.reading import CellRecord, Json, RunFiles, read_ledger, stage_directory

MAX_SOURCE_ROWS = 300
_CORPUS_PAGE = "corpus.html"


def source_use(cells: Sequence[CellRecord]) -> Fold | None:
    """Budget, use and supply of every source, cell by cell; None where no ledger lists them."""
    rows = [row for cell in cells for row in _rows(cell)]
    if not rows:
        return None
    units = {str(read_ledger(cell).get("budget_unit", "tokens")) for cell in cells}
    unit = " or ".join(sorted(units)).replace("_", " ")
    columns = ("Cell", "Role", "Source", "Budget", "Used", "Available", "Examples", "Repeats")
    table = Table(
        f"Sources by cell, in {unit}; repeats are passes over the examples taken",
        columns,
        tuple(rows[:MAX_SOURCE_ROWS]),
        frozenset(columns[3:]),
        max(0, len(rows) - MAX_SOURCE_ROWS),
    )
    return Fold("What each cell took of each source", (table,))


def _rows(cell: CellRecord) -> Iterator[tuple[Entry, ...]]:
    for source in read_ledger(cell).get("sources") or ():
        yield _row(cell, source)


def _row(cell: CellRecord, source: Json) -> tuple[Entry, ...]:
    budget, available = (as_number(source.get(name)) for name in ("budget", "available"))
    is_short = budget is not None and available is not None and available < budget
    repeats = as_number(source.get("repeats"))
    return (
        Entry(cell_title(cell)),
        Entry(str(source.get("role", MISSING))),
        Entry(str(source.get("source", MISSING))),
        Entry(format_count(source.get("budget"))),
        Entry(
            format_count(source.get("used")),
            remark="all of it: less than the budget" if is_short else "",
        ),
        Entry(format_count(source.get("available"))),
        Entry(format_count(source.get("num_examples"))),
        Entry(MISSING if repeats is None else f"{repeats:.3g}"),
    )


def corpus_link(run: RunFiles) -> Link | None:
    """The page of the curated corpora, where it lies in the run directory."""
    curated = stage_directory(run.root, (run.manifest.get("stages") or {}).get("curate"))
    if curated is None or not (curated / _CORPUS_PAGE).is_file():
        return None
    return Link(
        "The page of the curated corpora",
        f"stages/{curated.name}/{_CORPUS_PAGE}",
        "shows lengths, languages, and what was set aside, row by row with texts. It lies in the"
        " run directory, beside this report.",
    )
