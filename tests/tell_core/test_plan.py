from pathlib import Path

import pytest

from tell_core.pipeline import curate_stage, mix_stage
from tell_core.plan import make_plan, plan_rows
from tell_core.spec.cells import plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tests.fixtures.tiny import tiny_fields

ARMS = ["base", "base_few_shot", "sft", "sft_matched", "tell", "tell_anchor_all", "general_only"]


@pytest.fixture
def spec(tiny_world: Path) -> ExperimentSpec:
    return ExperimentSpec.model_validate(tiny_fields(tiny_world) | {"arms": ARMS, "seeds": [0]})


def test_planned_ledgers_equal_those_of_the_run(spec: ExperimentSpec, tmp_path: Path):
    curated = curate_stage(spec, tmp_path)

    plan = make_plan(spec, curated)

    for entry in plan.cells:
        mixed = mix_stage(spec, entry.cell, curated)
        assert entry.ledger == read_json(mixed.path / "ledger.json")


def test_trainings_are_counted_with_those_of_tuning(spec: ExperimentSpec, tmp_path: Path):
    plan = make_plan(spec, curate_stage(spec, tmp_path))

    tuning, cells = len(tuning_cells(spec)), plan_cells(spec)
    assert len(plan.cells) == tuning + len(cells) == len(plan_rows(plan))
    untrained = 2
    assert sum(entry.num_trainings for entry in plan.cells) == 2 * tuning + len(cells) - untrained
    assert plan.training_seconds > 0
    assert plan.disk_bytes > 0
