from pathlib import Path

import pytest

from tell_core.analysis.power import Noise
from tell_core.cost import num_parameters
from tell_core.data.corpus import Corpus
from tell_core.data.token_store import INDEX_FILE
from tell_core.pipeline import curate_stage, mix_stage
from tell_core.plan import make_plan, measured_noise, plan_rows, power_of, shortages
from tell_core.spec.cells import plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json, write_json
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


def test_data_and_mixtures_take_the_disk_space_they_will_have(spec: ExperimentSpec, tmp_path: Path):
    curated = curate_stage(spec, tmp_path)
    plan = make_plan(spec, curated)
    weights = sum(entry.num_trainings for entry in plan.cells) * 4
    weights *= num_parameters(Path(spec.model.id))

    mixed = [mix_stage(spec, entry.cell, curated).path / INDEX_FILE for entry in plan.cells]

    stores = [curated.path, *(tmp_path / "stages").glob("tokens-*")]
    held = sum(path.stat().st_size for store in stores for path in store.iterdir())
    indexes = [path.stat().st_size for path in mixed if path.exists()]
    overhead = 1200 * len(indexes)  # headers of the files, digests in them
    assert 0 <= held + sum(indexes) - (plan.disk_bytes - weights) <= overhead


def test_a_budget_beyond_the_pool_is_said_once_with_what_there_is(
    spec: ExperimentSpec, tmp_path: Path
):
    budgets = {"task_tokens": (200, 10**6), "general_tokens": (800, 10**7)}
    large = spec.model_copy(update={"budgets": spec.budgets.model_copy(update=budgets)})
    curated = curate_stage(spec, tmp_path)

    general, task = shortages(make_plan(large, curated))

    num_tokens = {
        part: int(Corpus(curated.path / f"{part}.parquet").num_tokens.sum())
        for part in ("general", "task_train")
    }
    assert general.startswith("a general budget of 10,000,000 tokens is more than there is")
    assert f"with {num_tokens['general']:,} tokens are used" in general
    assert task.startswith("a task budget of 1,000,000 tokens is more than there is")
    assert f"with {num_tokens['task_train']:,} tokens are used" in task
    assert shortages(make_plan(spec, curated)) == []


def test_weights_kept_at_every_probe_are_counted_in_the_disk(spec: ExperimentSpec, tmp_path: Path):
    curated = curate_stage(spec, tmp_path)
    usual = make_plan(spec, curated).disk_bytes
    training = spec.training.model_copy(update={"keep_probe_weights": True, "num_probes": 2})

    kept = make_plan(spec.model_copy(update={"training": training}), curated)

    num_trainings = sum(entry.num_trainings for entry in kept.cells)
    weights = (kept.disk_bytes - usual) / num_trainings / 4
    assert weights == pytest.approx(num_parameters(Path(spec.model.id)) * 2)


def test_the_noise_of_an_earlier_run_enters_what_the_design_can_show(
    spec: ExperimentSpec, tmp_path: Path
):
    spec = spec.model_copy(update={"seeds": (0, 1, 2)})
    curated = curate_stage(spec, tmp_path)
    before = power_of(spec, curated)["exact_match"]
    rows = [
        {"seed_sd": 0.3, "item_difference_sd": 0.1},
        {"seed_sd": None, "item_difference_sd": None},
        {"seed_sd": 0.4, "item_difference_sd": 0.7},
    ]
    entry = {"power": {"by_task_budget": rows}}
    write_json(tmp_path / "leverage.json", {"metrics": {"exact_match": entry}})

    after = power_of(spec, curated)["exact_match"]

    assert measured_noise(tmp_path, "exact_match") == pytest.approx(Noise(0.125**0.5, 0.5))
    assert measured_noise(tmp_path, "mcc") is None
    assert after["smallest_difference"] > before["smallest_difference"]
    assert "earlier run" in after["assumption"]
