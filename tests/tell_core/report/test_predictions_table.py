from collections.abc import Callable
from pathlib import Path

import pytest

from tell_core.report import q_sequence
from tell_core.report.blocks import Fold, Table, Text, charts_of
from tell_core.report.predictions_table import mechanism
from tell_core.report.reading import read_run
from tell_core.store import write_json
from tests.tell_core.report.mechanism_files import PART, row, sequence, write_mechanism

BuildRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture
def tested(build_run: BuildRun) -> Path:
    path = build_run()
    write_mechanism(path)
    return path


def folds(path: Path) -> dict[str, Fold]:
    """The open parts of the chapter, by the word that they begin with."""
    blocks = mechanism(read_run(path)).blocks
    return {block.summary.split(":")[0]: block for block in blocks if isinstance(block, Fold)}


def words_of(path: Path, name: str) -> str:
    block = folds(path)[name].blocks[0]
    assert isinstance(block, Text)
    return block.text


def test_every_prediction_has_its_verdict_estimate_interval_and_corrected_p(tested: Path) -> None:
    table = next(b for b in mechanism(read_run(tested)).blocks if isinstance(b, Table))

    assert [line[0].text for line in table.rows] == [f"P{number}" for number in range(1, 8)]
    first = [entry.text for entry in table.rows[0]]
    assert first[2:6] == ["supported", "0.300", "[0.100, ∞]", "0.04"]


def test_every_prediction_has_a_figure_of_its_own(tested: Path) -> None:
    for name, fold in folds(tested).items():
        assert list(charts_of(fold.blocks)), name
    assert [name for name in folds(tested) if name.startswith("P")] == [
        f"P{number}" for number in range(1, 8)
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (row("P1", "supported"), "Supported: all 2 parts lie on the predicted side"),
        (row("P1", "supported", components=[PART]), "Supported: its measure lies"),
        (row("P1", "contradicted"), "Contradicted: on the other side, and chance is excluded "
         "(p = 0.04 after Holm): loss."),
        (row("P1", "undetermined"), "Undetermined: the null is not excluded: gain (p = 0.04 after "
         "Holm). 2 of 2 parts on the predicted side."),
        (row("P1", "undetermined", p_value=None, p_holm=None, components=[], reason="an arm"),
         "Undetermined: this run lacks what the prediction needs: an arm."),
        (row("P1", "supported", p_holm=1e-5), "(p < 0.001 after Holm)"),
    ],
)  # fmt: skip
def test_a_verdict_is_a_sentence_with_its_reason(tested: Path, changed: dict, words: str) -> None:
    write_mechanism(tested, [changed])

    assert words in words_of(tested, "P1")


def test_the_figures_behind_the_verdicts_carry_their_numbers(tested: Path) -> None:
    charts = {chart.name: chart for chart in charts_of(mechanism(read_run(tested)).blocks)}

    assert "5 items with a step, 7 others shown" in charts["prediction-1"].alt
    assert ("shared", 2.0, 1.0) in charts["prediction-2"].data.rows
    assert len(charts["prediction-3"].data.rows) == 10
    assert "0.300" in charts["prediction-7-tell"].alt


def test_every_order_has_its_difference_in_score_and_in_what_is_kept(tested: Path) -> None:
    charts = {chart.name: chart for chart in charts_of(folds(tested)["P5"].blocks)}

    kept = charts["prediction-5-general_log_probability"]
    assert [line[1] for line in kept.data.rows] == ["tell_blocks(4)", "tell_task_first"]
    scores = [block for block in folds(tested)["P5"].blocks if isinstance(block, Table)][-1]
    assert [line[0].text for line in scores.rows] == [
        "TELL", "TELL blocks(4)", "TELL task first", "base",
    ]  # fmt: skip
    assert scores.rows[0][1].text == "−0.500 [−0.600, −0.400]"


def test_leverage_that_is_only_bounded_is_called_a_bound(tested: Path) -> None:
    (chart,) = charts_of(folds(tested)["P6"].blocks)

    assert "2.4 at 960, at least 1.6 at 3,840" in chart.alt
    assert [line[-1] for line in chart.data.rows] == [None, "above"]


def test_the_q_sequence_shows_every_unit_that_had_something_to_learn(tested: Path) -> None:
    fold = folds(tested)["The Q sequence"]
    charts = {chart.name: chart for chart in charts_of(fold.blocks)}

    rows = charts["q-sequence-tell"].data.rows
    assert [line[0] for line in rows] == list(range(1, 40))
    assert [line[6] for line in rows] == sorted(line[6] for line in rows)
    assert [key.label for key in charts["q-sequence-tell"].legend] == [
        "shared with general data", "specific to the task",
    ]  # fmt: skip
    assert "1 not learned in every training" in charts["q-sequence-tell"].alt
    assert [line[1] for line in charts["q-sequence-sft"].data.rows] == [line[1] for line in rows]


def test_the_agreement_of_orders_is_given_between_seeds_and_with_tell(tested: Path) -> None:
    fold = folds(tested)["The Q sequence"]

    table = next(block for block in fold.blocks if isinstance(block, Table))
    assert [entry.text for entry in table.rows[0]] == [
        "TELL", "3", "39", "6\N{NO-BREAK SPACE}%", "0.620", "0.800", "–", "–",
    ]  # fmt: skip
    assert table.rows[0][4].remark == "0.550 to 0.700, 3 pairs"
    assert [entry.text for entry in table.rows[1]][3:] == [
        "0\N{NO-BREAK SPACE}%", "–", "–", "0.620", "0.800",
    ]  # fmt: skip


def test_a_long_sequence_is_thinned_in_the_figure_and_whole_in_its_table(
    tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q_sequence, "MAX_UNITS", 10)

    fold = folds(tested)["The Q sequence"]

    assert any("10 of 39 units are drawn" in getattr(b, "caption", "") for b in fold.blocks)
    assert len(next(charts_of(fold.blocks)).data.rows) == 39


def test_a_sequence_of_an_earlier_version_is_left_out(tested: Path) -> None:
    old = {"arms": {"tell": {"order": [], "steps": []}}, "units": []}
    write_json(tested / "quanta" / "sequence.json", old)

    assert "The Q sequence" not in folds(tested)


def test_without_a_split_the_sequence_is_drawn_all_the_same(tested: Path) -> None:
    write_json(tested / "quanta" / "sequence.json", sequence() | {"groups": None})

    (key,) = next(charts_of(folds(tested)["The Q sequence"].blocks)).legend

    assert key.label == "no split registered"


def test_a_run_that_was_not_tested_says_how_to_test_it(build_run: BuildRun) -> None:
    (sentence,) = mechanism(read_run(build_run())).blocks

    assert isinstance(sentence, Text)
    assert "tell quanta predictions" in sentence.text
