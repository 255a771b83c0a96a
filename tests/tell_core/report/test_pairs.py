"""Items of TELL and the best SFT: which pairs, which verdicts, how much fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tell_core.report.carried import carried_size
from tell_core.report.pairs import MAX_TEXT, browser_data, pairs, right_rule
from tell_core.report.predictions import predictions
from tell_core.report.reading import RunFiles, read_run

BuildRun = Callable[..., Path]


@pytest.fixture
def run(build_run: BuildRun) -> RunFiles:
    return read_run(build_run())


def test_pairs_share_budgets_and_seed(run: RunFiles) -> None:
    found = pairs(run)

    assert len(found) == 6
    for pair in found:
        assert pair.tell.arm == "tell"
        assert pair.sft.arm in ("sft", "sft_matched")
        assert pair.sft.task_budget_tokens == pair.tell.task_budget_tokens
        assert pair.sft.seed == pair.tell.seed
        assert pair.sft.general_budget_tokens in (None, pair.tell.general_budget_tokens)


def test_the_better_sft_by_the_mean_over_seeds_is_taken(run: RunFiles) -> None:
    for pair in pairs(run):
        means = {
            arm: _mean(run, arm, pair.tell.task_budget_tokens) for arm in ("sft", "sft_matched")
        }
        assert pair.sft.arm == max(means, key=lambda arm: means[arm])


def test_lower_is_better_turns_the_choice_round(build_run: BuildRun) -> None:
    path = build_run()
    leverage = json.loads((path / "leverage.json").read_text())
    leverage["metrics"]["log_probability"]["higher_is_better"] = False
    (path / "leverage.json").write_text(json.dumps(leverage))
    run = read_run(path)

    for pair in pairs(run):
        means = {
            arm: _mean(run, arm, pair.tell.task_budget_tokens) for arm in ("sft", "sft_matched")
        }
        assert pair.sft.arm == min(means, key=lambda arm: means[arm])


def test_gain_and_verdict_are_those_of_the_predictions(run: RunFiles) -> None:
    pair = pairs(run)[0]
    ours, theirs = (_rows(run, cell.name) for cell in (pair.tell, pair.sft))

    assert len(pair.items) == len(ours) == 80
    for item in pair.items:
        tell, sft = ours[item.item_id], theirs[item.item_id]
        assert item.gain == pytest.approx((sft["nll"] - tell["nll"]) / 5)
        assert item.tell_right == (tell["prediction"] == tell["reference"])
        assert item.differs == (tell["parsed"] != sft["parsed"])
    assert right_rule(pair.items) == "Exact match is 1"
    gains = [item.gain for item in pair.items]
    assert gains == sorted(gains, reverse=True)


def test_without_exact_match_an_answer_is_right_when_it_equals_the_reference(
    build_run: BuildRun,
) -> None:
    path = build_run()
    for file in (path / "predictions").iterdir():
        table = pq.read_table(file)
        place = table.schema.get_field_index("scores")
        pq.write_table(table.set_column(place, "scores", [["{}"] * len(table)]), file)

    pair = pairs(read_run(path))[0]

    assert right_rule(pair.items) == "it equals the reference"
    assert {item.tell_right for item in pair.items} == {True, False}
    assert all(item.tell_right == (item.tell_text == item.reference) for item in pair.items)


def test_everything_is_carried_where_there_is_room(run: RunFiles) -> None:
    found = pairs(run)

    data = browser_data(run, found, 10**7)

    assert len(data["pairs"]) == data["num_pairs"] == len(found)
    assert len(data["items"]) == data["num_items"] == 80
    for pair, entry in zip(found, data["pairs"], strict=True):
        names = [data["items"][row[0]][0] for row in entry["rows"]]
        assert names == [item.item_id for item in pair.items]


@pytest.mark.parametrize("max_bytes", [300, 1_000, 5_000, 20_000, 40_000, 80_000])
def test_what_is_carried_never_exceeds_its_room(run: RunFiles, max_bytes: int) -> None:
    found = pairs(run)

    data = browser_data(run, found, max_bytes)

    assert carried_size(data) <= max_bytes
    assert (data["num_pairs"], data["num_items"]) == (len(found), 80)
    assert all(row[0] < len(data["items"]) for pair in data["pairs"] for row in pair["rows"])


def test_a_page_with_little_room_keeps_the_largest_differences_and_says_so(run: RunFiles) -> None:
    lead = pairs(run)[0]

    section = predictions(run, 5_000)

    data = next(block.items for block in section.blocks if block.kind == "browser")
    kept = {row[0] for row in data["items"]}
    ranked = sorted(lead.items, key=lambda item: -abs(item.gain))
    assert 0 < len(kept) < 80
    assert kept == {item.item_id for item in ranked[: len(kept)]}
    note = " ".join(block.text for block in section.blocks if block.kind == "text")
    assert "this page holds 1 of 6 comparisons" in note
    assert f"{len(kept)} of 80 items" in note


def test_long_texts_end_with_an_ellipsis(build_run: BuildRun) -> None:
    run = read_run(build_run(hostile="x" * 3 * MAX_TEXT))

    item = pairs(run)[0].items[0]

    for text in (item.prompt, item.tell_text, item.sft_text):
        assert len(text) == MAX_TEXT + 2
        assert text.endswith(" …")


def test_without_predictions_there_is_a_sentence(build_run: BuildRun) -> None:
    section = predictions(read_run(build_run(without=frozenset({"predictions"}))))

    assert [block.kind for block in section.blocks] == ["text"]


def _mean(run: RunFiles, arm: str, task: int | None) -> float:
    scores = [
        row["score"]
        for row in run.results
        if (row["arm"], row["task_budget_tokens"], row["metric"]) == (arm, task, "log_probability")
    ]
    return sum(scores) / len(scores)


def _rows(run: RunFiles, cell: str) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(run.root / "predictions" / f"{cell}.parquet").to_pylist()
    return {row["item_id"]: row for row in rows}
