"""P4 on simulated runs: what a model's hidden states would be is given here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tell_core.analysis import anchor_effect, separability
from tell_core.analysis.anchor_effect import anchor_mediates
from tell_core.analysis.quanta import loading
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import judge
from tell_core.data.encoding import from_lists
from tell_core.spec.cells import Cell
from tests.tell_core.analysis.small_runs import (
    NUM_TEST,
    World,
    by_use,
    quantum_world,
    run_spec,
    write_run,
)

ARMS = ["tell", "tell_no_anchor", "tell_random_anchor", "sft"]
SEPARATE, MIXED = 1.0, 0.0
KEPT_ITEM = '{"item_id": "kept-0", "role": "retention", "extra": {"skill": "a"}}\n'


def better_with_the_anchor(cell: Cell, generator: np.random.Generator) -> np.ndarray:
    return (1.0 if cell.arm == "tell" else 2.0) + generator.normal(0, 0.05, NUM_TEST)


def write_probes(directory: Path) -> None:
    """One item more than were simulated, of a retention set, and examples of three tokens."""
    items = directory / "probe_items.jsonl"
    items.write_text(items.read_text() + KEPT_ITEM)
    is_task = ['"role": "task"' in line for line in items.read_text().splitlines()]
    examples = from_lists([([1, 2, 3], 2)] * len(is_task), is_task=True)
    examples.is_task[:] = is_task
    examples.save(directory / "probe.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> RunCells:
    spec = run_spec(
        arms=ARMS, seeds=[0, 1, 2, 3], budgets={"task_tokens": [480], "general_tokens": [200]}
    )
    found, cells = write_run(tmp_path, spec, World(better_with_the_anchor, quantum_world, by_use))
    for cell in cells:
        write_probes(cell.mixed)
    return found


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch):
    """Gives each arm states whose classes are so far apart; returns what the models were asked."""
    asked: list[dict] = []

    def use(apart: dict[str, float]) -> list[dict]:
        def load(_model, *, trained: Path, device: torch.device, **_given):
            arm = max((arm for arm in ARMS if trained.name.startswith(arm)), key=len)
            seed = int(trained.name.rsplit("s", 1)[1])
            config = SimpleNamespace(num_hidden_layers=2)
            return SimpleNamespace(config=config, apart=apart[arm], seed=seed, device=device), None

        def found(model, examples, _layer):
            asked.append({"device": str(model.device), "num_examples": len(examples)})
            noise = np.random.default_rng(model.seed).normal(0, 1, (len(examples), 4))
            return noise + 3 * model.apart * np.asarray(examples.is_task)[:, None]

        monkeypatch.setattr(anchor_effect, "_NUM_PERMUTATIONS", 1)
        monkeypatch.setattr(loading, "load_subject", load)
        monkeypatch.setattr(separability, "last_prompt_states", found)
        return asked

    return use


def test_items_of_a_retention_set_are_of_neither_class(run: RunCells, states) -> None:
    asked = states(dict.fromkeys(ARMS, SEPARATE))

    found = anchor_mediates(run)

    assert {one["num_examples"] for one in asked} == {12 + 24}
    assert len(found.figure["projections"]["tell"]) == 12 + 24


def test_separability_that_a_random_text_gives_too_is_not_the_anchors(
    run: RunCells, states
) -> None:
    states({**dict.fromkeys(ARMS, MIXED), "tell": SEPARATE, "tell_random_anchor": SEPARATE})

    (row,) = judge([anchor_mediates(run)], 0.95)

    assert row["verdict"] != "supported"


def test_a_gain_with_separability_that_neither_control_has_is_supported(
    run: RunCells, states
) -> None:
    states({**dict.fromkeys(ARMS, MIXED), "tell": SEPARATE})

    (row,) = judge([anchor_mediates(run)], 0.95)

    assert row["verdict"] == "supported"
    assert [part["name"].rsplit(" ", 1)[1] for part in row["components"]] == [
        "tell_random_anchor",
        "tell_no_anchor",
        "tell_random_anchor",
    ]


def test_areas_are_paired_by_seed_where_an_arm_lacks_one(run: RunCells, states) -> None:
    states(dict.fromkeys(ARMS, SEPARATE / 3))
    lacking = {("tell", 0), ("tell_no_anchor", 3)}
    cells = tuple(cell for cell in run.cells if (cell.arm, cell.seed) not in lacking)

    found = anchor_mediates(replace(run, cells=cells))

    # Equal seeds have equal states here: paired rightly, nothing differs.
    assert found.components[1].estimate == 0
    assert (found.components[1].low, found.components[1].high) == (0, 0)


def test_models_are_loaded_where_the_specification_says(run: RunCells, states) -> None:
    asked = states(dict.fromkeys(ARMS, SEPARATE))
    training = run.spec.training.model_copy(update={"device": "cpu"})

    anchor_mediates(replace(run, spec=run.spec.model_copy(update={"training": training})))

    assert {one["device"] for one in asked} == {"cpu"}


def test_arms_without_common_seeds_are_not_compared(run: RunCells, states) -> None:
    states(dict.fromkeys(ARMS, SEPARATE))
    cells = tuple(
        cell for cell in run.cells if not (cell.arm == "tell_no_anchor" and cell.seed > 0)
    )

    assert "at least 2 seeds" in str(anchor_mediates(replace(run, cells=cells)).needs)
