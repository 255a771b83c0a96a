"""P7 from trainings that kept their weights: a tiny run, groups by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.directions import specific_directions
from tell_core.analysis.kept_weights import (
    MAX_GROUP_UNITS,
    cells_with_weights,
    choose_groups,
    movement_of,
    unit_samples,
)
from tell_core.analysis.registration import Split, task_units
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.data.encoding import EncodedExamples
from tell_core.evaluation.metrics import build_metrics
from tell_core.pipeline import curate_stage, run_cell
from tell_core.spec.cells import plan_cells
from tell_core.spec.model import ExperimentSpec
from tests.fixtures.tiny import tiny_fields


def tiny_spec(world: Path, method: str) -> ExperimentSpec:
    fields = tiny_fields(world) | {"arms": ["sft", "tell"]}
    fields["budgets"] = {"task_tokens": 200, "general_tokens": 400}
    fields["training"] |= {
        "learning_rate": 0.003, "num_probes": 3, "method": method, "keep_probe_weights": True,
    }  # fmt: skip
    return ExperimentSpec.model_validate(fields)


@pytest.fixture(scope="module", params=["full", "lora"])
def tiny_run(request, tiny_world: Path, tmp_path_factory) -> tuple[RunCells, Path]:
    torch.set_num_threads(1)
    spec, root = tiny_spec(tiny_world, request.param), tmp_path_factory.mktemp("run")
    curated = curate_stage(spec, root)
    outcomes = [
        run_cell(spec, cell, curated, spec.training.candidates[0]) for cell in plan_cells(spec)
    ]
    cells = [AnalysedCell.from_record(outcome.record()) for outcome in outcomes]
    return RunCells.read(spec, cells, build_metrics(spec.evaluation)), root


def trace_of(run: RunCells, arm: str = "tell") -> CellTrace:
    found = read_trace(run.of(arm)[0])
    assert found is not None
    return found


def split_by_place(run: RunCells) -> Split:
    """Every other token of the task is called shared."""
    names = task_units(trace_of(run)).names
    groups = {name: "shared" if place % 2 else "specific" for place, name in enumerate(names)}
    return Split(groups, "by hand")


def test_every_part_of_the_prediction_is_measured_on_a_run(tiny_run) -> None:
    run, root = tiny_run

    found = specific_directions(run, split_by_place(run), root)

    assert found.needs is None
    assert len(found.components) == 3
    assert all(part.low <= part.estimate <= part.high for part in found.components)


def test_a_movement_is_measured_once(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, root = tiny_run
    first = specific_directions(run, split_by_place(run), root)

    def measure(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("tell_core.analysis.kept_weights._measure", measure)

    assert specific_directions(run, split_by_place(run), root) == first


def test_losses_at_the_probes_are_those_that_training_recorded(tiny_run) -> None:
    run, root = tiny_run
    cell = run.of("tell")[0]
    groups = choose_groups(trace_of(run), split_by_place(run))

    found = movement_of(run.spec, cell, groups, root, None)

    expected = task_units(trace_of(run)).losses[:-1, groups.places]
    assert found.losses == pytest.approx(expected, abs=1e-4)


def test_a_unit_ends_with_its_token(tiny_run) -> None:
    run, _ = tiny_run
    trace = trace_of(run)
    groups = choose_groups(trace, split_by_place(run))

    samples = unit_samples(run.of("tell")[0], trace, groups)

    task_tokens = trace.token_ids[trace.is_task[trace.token_items]][groups.places]
    assert [int(samples.example(row)[-1]) for row in range(len(samples))] == task_tokens.tolist()
    assert (samples.supervised_counts == 1).all()


def test_without_traced_tokens_whole_items_are_the_units(tiny_run) -> None:
    run, _ = tiny_run
    trace = trace_of(run)
    bare = CellTrace(
        trace.cell, trace.steps, trace.items, trace.roles, trace.losses,
        *(np.empty(0, dtype=np.int64) for _ in range(3)), np.empty((len(trace.steps), 0)),
    )  # fmt: skip
    names = task_units(bare).names
    split = Split({n: "shared" if k < 3 else "specific" for k, n in enumerate(names)}, "")

    samples = unit_samples(run.of("tell")[0], bare, choose_groups(bare, split))

    probe = EncodedExamples.load(run.of("tell")[0].mixed / "probe.safetensors")
    assert (
        samples.supervised_counts == probe.supervised_counts[np.flatnonzero(bare.is_task)]
    ).all()


def test_groups_are_of_equal_size_and_no_larger_than_the_limit(tiny_run, monkeypatch) -> None:
    run, _ = tiny_run
    trace = trace_of(run)
    names = task_units(trace).names
    uneven = Split({n: "shared" if k < 7 else "specific" for k, n in enumerate(names)}, "")

    sizes = [choose_groups(trace, uneven).is_shared.tolist()]
    monkeypatch.setattr("tell_core.analysis.kept_weights.MAX_GROUP_UNITS", 3)
    sizes.append(choose_groups(trace, uneven).is_shared.tolist())

    assert [(sum(one), len(one)) for one in sizes] == [(7, 14), (3, 6)]
    assert MAX_GROUP_UNITS >= 7


def test_a_run_that_kept_no_weights_says_what_to_set(tiny_run, tmp_path: Path) -> None:
    run, root = tiny_run
    bare = [
        AnalysedCell(*(*list(vars(cell).values())[:7], tmp_path, cell.evaluated))
        for cell in run.cells
    ]
    without = RunCells(run.spec, tuple(bare), run.scores, run.resampling)

    assert "keep_probe_weights: true" in str(cells_with_weights(without, split_by_place(run)))
    found = specific_directions(without, split_by_place(run), root)
    assert "keep_probe_weights: true" in str(found.needs)


def test_a_single_seed_is_too_few(tiny_run) -> None:
    run, _ = tiny_run
    single = tuple(cell for cell in run.cells if cell.seed == 0)

    found = cells_with_weights(
        RunCells(run.spec, single, run.scores, run.resampling), split_by_place(run)
    )

    assert found == "at least 2 seeds of tell and sft; this run has 1"


def test_trainings_that_made_units_specific_do_not_stand_for_sft(tiny_run) -> None:
    run, root = tiny_run
    by_hand = split_by_place(run)
    split = Split(by_hand.groups, by_hand.digest, tuple(cell.name for cell in run.of("sft")))

    found = specific_directions(run, split, root)

    assert "arm sft_matched with weights kept" in str(found.needs)
    assert not found.components


def test_too_few_units_are_told(tiny_run) -> None:
    run, root = tiny_run
    names = task_units(trace_of(run)).names
    split = Split({n: "shared" if k < 2 else "specific" for k, n in enumerate(names)}, "")

    needs = specific_directions(run, split, root).needs

    assert needs is not None
    assert f"2 and {len(names) - 2}" in needs
