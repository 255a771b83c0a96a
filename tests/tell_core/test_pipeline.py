from pathlib import Path

import pytest

from tell_core.pipeline import (
    Stage,
    chosen_settings,
    compare_candidates,
    curate_stage,
    evaluate_fingerprint,
    expected_outcome,
    mix_stage,
    run_cell,
    settled,
    train_fingerprint,
)
from tell_core.spec.arms import ARM_NAMES, parse_arm
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import read_json, write_json
from tests.fixtures.tiny import tiny_fields, write_tiny_spec


@pytest.fixture(scope="module")
def spec(tiny_world: Path) -> ExperimentSpec:
    return ExperimentSpec.model_validate(tiny_fields(tiny_world))


@pytest.fixture(scope="module")
def curated(spec: ExperimentSpec, tmp_path_factory) -> Stage:
    return curate_stage(spec, tmp_path_factory.mktemp("run"))


def changed(spec: ExperimentSpec, section: str, **values) -> ExperimentSpec:
    fields = spec.model_dump()
    return ExperimentSpec.model_validate(fields | {section: fields[section] | values})


TELL = Cell("tell", 200, 800, 0)
SETTINGS = Candidate(0.003, 1)


def test_a_stage_is_worked_once(spec: ExperimentSpec, curated: Stage):
    again = curate_stage(spec, curated.root)

    assert again.reused
    assert again.path == curated.path


@pytest.mark.parametrize(
    "values",
    [{"threads": 2}, {"device": "auto"}, {"checkpoint_seconds": 1.0}, {"micro_batch_size": 2}],
)
def test_where_and_how_fast_never_enter_a_training(spec, curated, values):
    mixed = mix_stage(spec, TELL, curated)

    other = changed(spec, "training", **values)

    assert train_fingerprint(other, mixed) == train_fingerprint(spec, mixed)


@pytest.mark.parametrize(
    "values", [{"schedule": "linear"}, {"weight_decay": 0.1}, {"keep": "last"}, {"num_probes": 5}]
)
def test_what_shapes_the_weights_enters_a_training(spec, curated, values):
    mixed = mix_stage(spec, TELL, curated)

    other = changed(spec, "training", **values)

    assert train_fingerprint(other, mixed) != train_fingerprint(spec, mixed)


def test_another_learning_rate_is_another_training(spec, curated):
    mixed = mix_stage(spec, TELL, curated)

    other = settled(spec, Candidate(0.2, spec.training.num_epochs))

    assert train_fingerprint(other, mixed) != train_fingerprint(spec, mixed)


def test_another_metric_scores_anew_but_trains_nothing(spec, curated):
    other = changed(spec, "evaluation", metrics=["character_error_rate"])
    mixed = mix_stage(spec, TELL, curated)

    assert mix_stage(other, TELL, curated).fingerprint == mixed.fingerprint
    assert train_fingerprint(other, mixed) == train_fingerprint(spec, mixed)
    assert evaluate_fingerprint(other, mixed, None) != evaluate_fingerprint(spec, mixed, None)


def test_moved_data_are_the_same_data(spec, curated, tiny_world: Path, tmp_path: Path):
    for name in ("task_train.jsonl", "task_test.jsonl", "general.jsonl"):
        (tmp_path / name).write_bytes((tiny_world / name).read_bytes())
    moved = write_tiny_spec(
        tmp_path / "spec.yaml",
        tiny_world,
        task={
            "train": str(tmp_path / "task_train.jsonl"),
            "test": str(tmp_path / "task_test.jsonl"),
        },
        general=[str(tmp_path / "general.jsonl")],
    )

    assert curate_stage(load_spec(moved), curated.root).fingerprint == curated.fingerprint


def test_changed_data_are_other_data(curated, tiny_world: Path, tmp_path: Path):
    lines = (tiny_world / "task_train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "task_train.jsonl").write_text("".join(lines[:-1]))
    other = write_tiny_spec(
        tmp_path / "spec.yaml", tiny_world, task={"train": str(tmp_path / "task_train.jsonl")}
    )

    assert curate_stage(load_spec(other), curated.root).fingerprint != curated.fingerprint


def test_two_runs_give_the_same_scores_and_weights(spec, curated, tmp_path: Path):
    first = run_cell(spec, TELL, curated, SETTINGS)
    second = run_cell(spec, TELL, curate_stage(spec, tmp_path), SETTINGS)

    assert first.trained is not None
    assert second.trained is not None
    for name in ("scores.json", "predictions.jsonl"):
        assert (first.evaluated.path / name).read_bytes() == (
            second.evaluated.path / name
        ).read_bytes()
    weights = "model/model.safetensors"
    assert (first.trained.path / weights).read_bytes() == (
        second.trained.path / weights
    ).read_bytes()


def _holds_task_data(cell: Cell) -> bool:
    arm = parse_arm(cell.arm)
    return arm.uses_task or arm.has_shots


@pytest.mark.parametrize("cell", [TELL, Cell("base", None, None, 0)])
def test_what_a_cell_will_leave_behind_is_known_before_it_is_there(spec, curated, cell: Cell):
    mixed = mix_stage(settled(spec, SETTINGS), cell, curated)

    expected = expected_outcome(spec, cell, mixed, SETTINGS)

    left = run_cell(spec, cell, curated, SETTINGS)
    assert (expected.cell, expected.settings) == (left.cell, left.settings)
    assert expected.evaluated.path == left.evaluated.path
    assert (expected.trained and expected.trained.path) == (left.trained and left.trained.path)


def test_every_planned_cell_can_be_mixed_for_every_arm(spec, curated):
    arms = [name.replace("(k)", "(3)") for name in ARM_NAMES]
    fields = spec.model_dump() | {"arms": arms, "seeds": [0]}
    every = ExperimentSpec.model_validate(fields)

    ledgers = {
        cell.name: read_json(mix_stage(every, cell, curated).path / "ledger.json")
        for cell in plan_cells(every)
    }

    assert {name for name, ledger in ledgers.items() if not ledger["task_tokens"]} == {
        cell.name for cell in plan_cells(every) if not _holds_task_data(cell)
    }


def test_the_lowest_dev_loss_is_chosen_and_ties_go_to_the_smaller_rate(tmp_path: Path):
    losses = {(0.1, 1): 2.0, (0.01, 1): 1.0, (0.001, 2): 1.0, (0.001, 1): 1.0}
    trainings = []
    for number, (settings, loss) in enumerate(losses.items()):
        stage = Stage("train", str(number), tmp_path, reused=False)
        stage.path.mkdir(parents=True)
        write_json(stage.path / "summary.json", {"kept_dev_loss": loss})
        trainings.append((Candidate(*settings), stage))

    table = compare_candidates(TELL, trainings)

    assert table["chosen"] == {"learning_rate": 0.001, "epochs": 1}
    assert len(table["candidates"]) == 4


def test_an_arm_that_was_not_tuned_takes_the_only_settings(spec):
    assert chosen_settings(spec, {}, "tell") == spec.training.candidates[0]
    assert chosen_settings(
        spec, {"tell": {"chosen": {"learning_rate": 0.5, "epochs": 2}}}, "tell"
    ) == (0.5, 2)


def test_tuned_epochs_lay_out_other_mixtures_and_each_is_tried(spec, curated):
    tuned = changed(spec, "training", epochs=(1, 2), learning_rate=(0.001, 0.003))

    mixtures = {
        mix_stage(settled(tuned, settings), TELL, curated).fingerprint
        for settings in tuned.training.candidates
    }

    assert len(tuned.training.candidates) == 4
    assert len(mixtures) == 2
