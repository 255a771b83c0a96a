"""The search for an anchor on the tiny world; what the model writes is given here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core import anchor_search
from tell_core.analysis.anchor_candidates import Drawn, Proposing
from tell_core.analysis.anchor_scores import Difference
from tell_core.analysis.multiple import holm
from tell_core.anchor_search import RESULT_FILE, Searching, halves, search_anchors
from tell_core.data.rendering import Example
from tell_core.errors import InputError
from tell_core.pipeline import Stage, curate_stage
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tests.fixtures.tiny import tiny_fields

TEXTS = ("turn every word around", "write json of it all", "copy the word as it is")
HOW = Searching(num_shots=1, num_random=2)


@pytest.fixture(scope="module")
def spec(tiny_world: Path) -> ExperimentSpec:
    torch.set_num_threads(1)
    fields = tiny_fields(tiny_world)
    fields["task"]["dev_examples"] = 10
    fields["training"] |= {"learning_rate": 0.003, "num_probes": 3}
    return ExperimentSpec.model_validate(fields)


@pytest.fixture(scope="module")
def curated_once(spec: ExperimentSpec, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return curate_stage(spec, tmp_path_factory.mktemp("run"))


@pytest.fixture
def curated(curated_once: Stage, tmp_path: Path) -> Stage:
    """A copy of its own for every test."""
    root = tmp_path / "run"
    shutil.copytree(curated_once.root, root)
    return Stage("curate", curated_once.fingerprint, root, reused=True)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch):
    """Lets the model write these texts, and counts how often it is asked."""
    asked = []

    def use(*texts: str) -> list[int]:
        def draw(_model, _renderer, pool, how, _device) -> list[Drawn]:
            asked.append(how.num_candidates)
            return [Drawn(text, (Example("a", "b"),)) for text in texts]

        monkeypatch.setattr(anchor_search, "draw_candidates", draw)
        return asked

    return use


def test_candidates_stand_beside_all_controls(spec, curated, writes) -> None:
    writes(*TEXTS)

    found = search_anchors(spec, curated, HOW)

    kinds = [row["kind"] for row in found["rows"]]
    assert kinds.count("candidate") == 3
    assert kinds.count("random text") == 2
    assert [one["against"] for one in found["tested"]] == ["no anchor", "random text", "given"]
    best = max((r for r in found["rows"] if r["kind"] == "candidate"), key=lambda r: r["choosing"])
    assert found["chosen"] == best["text"]
    random = [row for row in found["rows"] if row["kind"] == "random text"]
    assert {row["num_tokens"] for row in random} == {best["num_tokens"]}


def test_no_test_item_is_read(spec, curated, writes) -> None:
    writes(*TEXTS)
    for path in curated.path.glob("task_test*"):
        path.unlink()

    assert search_anchors(spec, curated, HOW)["chosen"] in TEXTS


def test_a_search_is_made_once_and_written_whole(spec, curated, writes) -> None:
    asked = writes(*TEXTS)

    first = search_anchors(spec, curated, HOW)
    again = search_anchors(spec, curated, HOW)

    assert first == again == read_json(curated.root / RESULT_FILE)
    assert len(asked) == 1


def seeded(seed: int) -> Searching:
    return Searching(Proposing(seed=seed), num_shots=0, num_random=2)


def test_searches_with_other_seeds_are_counted_as_tries(spec, curated, writes) -> None:
    writes(*TEXTS)
    p_values = []

    for tried, seed in enumerate((0, 1, 2), start=1):
        found = search_anchors(spec, curated, seeded(seed))
        p_values += [one["p_value"] for one in found["tested"]]
        expected = [min(1.0, tried * p) for p in holm(p_values)[-len(found["tested"]) :]]
        assert [one["p_holm"] for one in found["tested"]] == expected
        assert (found["num_tries"], found["num_comparisons"]) == (tried, len(p_values))

    again = search_anchors(spec, curated, seeded(0))
    assert (again["num_tries"], again["num_comparisons"]) == (3, len(p_values))


def test_a_search_without_a_candidate_is_a_try_too(spec, curated, writes) -> None:
    writes("")
    search_anchors(spec, curated, seeded(0))
    writes(*TEXTS)

    assert search_anchors(spec, curated, seeded(1))["num_tries"] == 2


def test_trying_until_a_candidate_is_adopted_is_seen_through(
    spec, curated, writes, monkeypatch
) -> None:
    """A p of 0.03 against every control is enough once, and not after nine other tries."""
    writes(*TEXTS)
    difference = Difference("no anchor", 0.1, 0.0, 0.2, 0.03, 0.03)
    monkeypatch.setattr(anchor_search, "compare", lambda *_given: [difference])

    verdicts = [search_anchors(spec, curated, seeded(seed))["verdict"] for seed in range(10)]

    assert verdicts == ["adopt"] + ["undetermined"] * 9


def test_trainings_and_what_the_base_model_says_are_one_family(spec, curated, writes, monkeypatch):
    writes(TEXTS[0])
    monkeypatch.setattr(
        anchor_search, "_dev_scores",
        lambda *_given: np.random.default_rng(0).normal(size=spec.task.dev_examples),
    )  # fmt: skip

    found = search_anchors(spec, curated, HOW, is_trained=True)

    p_values = [one["p_value"] for one in (*found["tested"], *found["trained"]["tested"])]
    assert [one["p_holm"] for one in found["trained"]["tested"]] == holm(p_values)[3:]
    assert search_anchors(spec, curated, HOW)["num_comparisons"] == 6


def test_a_model_that_writes_no_instruction_leaves_the_anchor_as_it_is(spec, curated, writes):
    writes("", "no", "\ufffd\ufffd\ufffd at all")

    found = search_anchors(spec, curated, HOW, is_trained=True)

    assert (found["verdict"], found["chosen"], found["trained"]) == ("no candidate", None, None)
    assert [one["reason"] for one in found["rejected"]] == ["empty", "too short", "unprintable"]


def test_the_real_tiny_model_is_asked_without_failing(spec, curated) -> None:
    found = search_anchors(spec, curated, HOW)

    assert len(found["rejected"]) + sum(r["kind"] == "candidate" for r in found["rows"]) == 12


def test_training_puts_the_candidate_on_task_prompts_and_changes_nothing_else(
    spec, curated, writes
) -> None:
    writes(TEXTS[0])
    before = (curated.path / "anchor.json").read_text()

    trained = search_anchors(spec, curated, HOW, is_trained=True)["trained"]

    assert [one["against"] for one in trained["tested"]] == ["no anchor", "random text", "given"]
    assert (curated.path / "anchor.json").read_text() == before
    texts = [
        "".join(piece for piece, _ in sample["pieces"])
        for path in (curated.root / "stages").glob("mix-*/samples.json")
        for sample in json.loads(path.read_text())
        if sample["role"] == "task"
    ]
    assert any(TEXTS[0] in text for text in texts)


def test_one_seed_of_trainings_is_told_as_such(spec, curated, writes, monkeypatch) -> None:
    """The candidate leads every control by a nat on every item, and still."""
    writes(TEXTS[0])
    leads = [0.0, -1.0, -1.0, -1.0]  # the candidate is trained first
    num_items = spec.task.dev_examples
    monkeypatch.setattr(
        anchor_search, "_dev_scores", lambda *_given: np.full(num_items, leads.pop(0))
    )
    one = spec.model_copy(update={"seeds": (0,)})

    trained = search_anchors(one, curated, HOW, is_trained=True)["trained"]

    assert trained["verdict"] == "undetermined"
    assert trained["reason"].startswith("one seed")


def test_training_without_general_data_is_refused(spec, curated, writes) -> None:
    writes(TEXTS[0])
    alone = spec.model_copy(update={"general": ()})

    with pytest.raises(InputError, match="general data"):
        search_anchors(alone, curated, HOW, is_trained=True)


@given(st.integers(8, 60), st.integers(0, 9))
def test_halves_share_no_item_and_leave_none_out(num_items: int, seed: int) -> None:
    ids = [f"item {number}" for number in range(num_items)]

    choosing, testing = halves(ids, seed)

    assert len(choosing) == num_items // 2
    assert sorted([*choosing, *testing]) == list(np.arange(num_items))


def test_too_few_dev_items_are_refused() -> None:
    with pytest.raises(InputError, match="dev_examples"):
        halves(["a", "b"], 0)
