from dataclasses import replace
from pathlib import Path

import pytest

from tell_core.report.blocks import Fold, Table
from tell_core.report.evidence import curation, ledger
from tell_core.report.page import page_templates
from tell_core.report.reading import CellRecord, RunFiles, read_run
from tell_core.report.source_use import corpus_link, source_use

pytestmark = pytest.mark.usefixtures("without_drawing")
SOURCE = {
    "role": "general", "source": "chat", "budget": 500, "used": 480, "available": 9000,
    "num_examples": 12, "repeats": 3.0,
}  # fmt: skip


def _cell(*sources: dict[str, object], unit: str = "tokens") -> CellRecord:
    found = {"budget_unit": unit, "sources": list(sources)}
    return CellRecord("tell", "tell", 500, 500, 0, None, found, None, None, None)


def _table(*cells: CellRecord) -> Table:
    fold = source_use(cells)
    assert fold is not None
    (table,) = fold.blocks
    assert isinstance(table, Table)
    return table


def test_each_source_of_each_cell_is_a_row() -> None:
    table = _table(_cell(SOURCE, SOURCE | {"source": "code"}), _cell(SOURCE))

    assert [row[2].text for row in table.rows] == ["chat", "code", "chat"]
    assert [entry.text for entry in table.rows[0]][3:] == ["500", "480", "9,000", "12", "3"]


def test_a_source_smaller_than_its_budget_says_so() -> None:
    table = _table(_cell(SOURCE | {"available": 480}))

    assert table.rows[0][4].remark == "all of it: less than the budget"


def test_the_unit_of_the_budgets_is_named() -> None:
    assert "in supervised tokens" in _table(_cell(SOURCE, unit="supervised_tokens")).caption


def test_ledgers_without_sources_show_nothing() -> None:
    assert source_use([_cell()]) is None


@pytest.fixture
def run(build_run) -> RunFiles:
    return read_run(build_run())


def test_the_sources_stand_in_the_ledger_section(run: RunFiles) -> None:
    cells = tuple(replace(cell, mix=None, ledger={"sources": [SOURCE]}) for cell in run.cells)

    section = ledger(replace(run, cells=cells))

    (fold,) = [block for block in section.blocks if isinstance(block, Fold)
               and block.summary == "What each cell took of each source"]  # fmt: skip
    (table,) = fold.blocks
    assert isinstance(table, Table)
    assert len(table.rows) == len(cells)


def test_the_corpus_page_is_linked_where_it_lies(run: RunFiles) -> None:
    assert corpus_link(run) is None
    page: Path = run.root / "stages" / run.manifest["stages"]["curate"] / "corpus.html"
    page.write_text("<p>corpus</p>")

    link = corpus_link(run)

    assert link is not None
    assert (run.root / link.path).samefile(page)
    assert link in [*curation(run).blocks]


def test_a_link_is_written_as_one_and_its_words_are_no_markup() -> None:
    template = page_templates().from_string(
        "{% from 'blocks.html.j2' import render_block %}{{ render_block(block) }}"
    )
    block = {"kind": "link", "text": "<b>", "path": 'a b/"c".html', "what": "<i>"}

    assert template.render(block=block).strip() == (
        '<p class="note"><a href="a%20b/%22c%22.html">&lt;b&gt;</a> &lt;i&gt;</p>'
    )
