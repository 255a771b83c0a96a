from pathlib import Path

import numpy as np
import pytest

from tell_core.alignment import NUM_DIMENSIONS
from tell_core.data.corpus import Corpus
from tell_core.pipeline import curate_stage, gradients_stage, mix_stage
from tell_core.plan import make_plan
from tell_core.spec.cells import plan_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tests.fixtures.tiny import tiny_fields


@pytest.fixture(scope="module")
def aligned(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory):
    """A specification with selection by alignment, its curated data and its gradients."""
    fields = tiny_fields(tiny_world) | {"arms": ["tell", "tell_aligned"], "seeds": [0]}
    fields["training"] |= {"learning_rate": 0.001}
    fields["budgets"] = {"task_tokens": [200, 400], "general_tokens": 800}
    spec = ExperimentSpec.model_validate(fields)
    curated = curate_stage(spec, tmp_path_factory.mktemp("aligned"))
    return spec, curated, gradients_stage(spec, curated)


def test_every_example_of_both_pools_has_a_gradient(aligned):
    _, curated, stage = aligned

    for part in ("task_train", "general"):
        found = np.load(stage.path / f"{part}.npy", allow_pickle=False)
        assert found.shape == (
            Corpus(curated.path / f"{part}.parquet").num_examples,
            NUM_DIMENSIONS,
        )
        assert np.all(np.linalg.norm(found, axis=1) > 0)


def test_gradients_are_taken_once(aligned):
    spec, curated, stage = aligned

    again = gradients_stage(spec, curated)

    assert again.reused
    assert again.fingerprint == stage.fingerprint


def test_plan_and_mixtures_agree_and_choose_other_examples_than_chance(aligned):
    spec, curated, _ = aligned

    planned = [plan.ledger for plan in make_plan(spec, curated).cells]
    mixed = [
        read_json(mix_stage(spec, cell, curated).path / "ledger.json") for cell in plan_cells(spec)
    ]

    assert planned == mixed
    assert all(0 < ledger["general_tokens"] <= 800 for ledger in mixed)
    random, chosen = mixed[0], mixed[2]
    assert random["task_tokens"] == chosen["task_tokens"]
    assert random["supervised_tokens"] != chosen["supervised_tokens"]
