import json
from pathlib import Path

import pytest

from tell_core.analysis.registration import read_split, register_split, task_units
from tell_core.analysis.traces import read_trace
from tell_core.errors import AnalysisError
from tell_core.spec.identity import fingerprint
from tests.tell_core.analysis.small_runs import (
    NUM_TASK,
    World,
    by_use,
    quantum_world,
    run_spec,
    stepping_tests,
    write_run,
)
from tests.tell_core.analysis.test_traces import write_cell

SPEC = run_spec(budgets={"task_tokens": [100, 480], "general_tokens": [200, 9400]})


@pytest.fixture
def cells(tmp_path: Path):
    return write_run(tmp_path, SPEC, World(stepping_tests, quantum_world, by_use))[1]


def test_the_split_reads_general_only_and_sft_at_their_largest_budgets(cells, tmp_path) -> None:
    register_split(cells, tmp_path / "split.json")

    read = json.loads((tmp_path / "split.json").read_text())["cells"]
    assert read == [
        *(f"general_only-g9400-s{seed}" for seed in range(3)),
        *(f"sft-t480-s{seed}" for seed in range(3)),
    ]


def test_the_split_does_not_depend_on_any_tell_arm(cells, tmp_path) -> None:
    alone = [cell for cell in cells if not cell.arm.startswith("tell")]

    with_tell = register_split(cells, tmp_path / "a.json")

    assert register_split(alone, tmp_path / "b.json").digest == with_tell.digest


def test_a_split_changed_by_hand_is_refused(cells, tmp_path) -> None:
    path = tmp_path / "split.json"
    register_split(cells, path)
    path.write_text(path.read_text().replace('"specific"', '"shared"', 1))

    with pytest.raises(AnalysisError, match="changed after it was registered"):
        read_split(path)


def test_a_registered_split_is_found_again_and_not_written_again(cells, tmp_path) -> None:
    path = tmp_path / "split.json"
    first = register_split(cells, path)
    written = path.stat().st_mtime_ns

    assert register_split(cells, path) == first
    assert path.stat().st_mtime_ns == written


def test_a_run_whose_split_came_out_differently_is_refused_and_the_file_stays(
    cells, tmp_path
) -> None:
    path = tmp_path / "split.json"
    register_split(cells, path)
    before = path.read_text()
    fewer = [cell for cell in cells if cell.seed < 2]

    with pytest.raises(AnalysisError, match="cell sft-t480-s2 is gone"):
        register_split(fewer, path)
    assert path.read_text() == before


def test_other_groups_of_the_same_cells_are_refused(cells, tmp_path) -> None:
    path = tmp_path / "split.json"
    register_split(cells, path)
    content = json.loads(path.read_text())
    del content["digest"]
    content["groups"]["dev-0"] = "neither"
    path.write_text(json.dumps({"digest": fingerprint(content), **content}))

    with pytest.raises(AnalysisError, match=r"1 units are in another group, 'dev-0' first"):
        register_split(cells, path)


def test_a_split_changed_by_hand_is_not_written_over(cells, tmp_path) -> None:
    path = tmp_path / "split.json"
    register_split(cells, path)
    path.write_text(path.read_text().replace('"specific"', '"shared"', 1))

    with pytest.raises(AnalysisError, match="changed after it was registered"):
        register_split(cells, path)


def test_units_that_the_split_does_not_know_are_refused(cells, tmp_path) -> None:
    split = register_split(cells, tmp_path / "split.json")

    with pytest.raises(AnalysisError, match="not in the registered split"):
        split.of(["another/3"])


@pytest.mark.parametrize("arm", ["general_only", "sft"])
def test_a_run_without_one_of_its_arms_cannot_be_split(cells, tmp_path, arm: str) -> None:
    others = [cell for cell in cells if cell.arm != arm]

    with pytest.raises(AnalysisError, match=f"needs arm {arm}"):
        register_split(others, tmp_path / "split.json")


def test_units_are_the_traced_tokens_of_task_items(tmp_path) -> None:
    trace = read_trace(write_cell(tmp_path, "a"))
    assert trace is not None

    units = task_units(trace)

    is_task = trace.token_items == 0
    assert units.names == tuple(f"dev-0/{p}" for p in trace.token_positions[is_task])
    assert units.losses.shape == (3, is_task.sum())


def test_without_traced_tokens_units_are_the_items(cells) -> None:
    trace = read_trace(cells[0])
    assert trace is not None

    assert task_units(trace).names == tuple(f"dev-{n}" for n in range(NUM_TASK))
