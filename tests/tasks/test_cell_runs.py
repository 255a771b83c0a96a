"""Child runs on a real SQLite store: each cell once, each point at its time, whatever was cut."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tasks.cell_runs import (
    NUM_POINTS,
    CellRuns,
    _metric,
    _safe,
    child_runs,
    curve_points,
    end_child_runs,
)
from tasks.tracking import connect
from tell_core.pipeline import CellOutcome, Stage
from tell_core.spec.cells import Cell
from tell_core.spec.model import Candidate
from tell_core.store import partial_path, write_json

BEGUN = 1_700_000_000.0  # seconds since 1970
STEP_SECONDS = 2.0
_NUMBERS = count()


def log_line(step: int, **more: Any) -> str:
    entry = {
        "step": step, "loss": 2.0, "task_loss": 1.5, "general_loss": None, "learning_rate": 1e-3,
        "grad_norm": 0.5, "tokens": 100, "seconds": STEP_SECONDS, "peak_memory_bytes": 1000,
        "finished": BEGUN + STEP_SECONDS * (step + 1),
    }  # fmt: skip
    return json.dumps(entry | more) + "\n"


def planned(root: Path, num_steps: int, arm: str = "tell") -> CellOutcome:
    """A cell whose data are laid out and whose training has not begun."""
    mixed, trained, evaluated = (
        Stage(name, "f" * 16, root, reused=False) for name in ("mix", "train", "evaluate")
    )
    write_json(mixed.path / "ledger.json", {"steps": num_steps, "task_tokens": 7})
    write_json(mixed.path / "_SUCCESS", {"finished": BEGUN})
    cell = Cell(arm, 200, 800, 0)
    if arm == "base":
        return CellOutcome(cell, mixed, None, evaluated, None)
    return CellOutcome(cell, mixed, trained, evaluated, Candidate(1e-3, 1))


def train(outcome: CellOutcome, num_steps: int, *, is_over: bool = False) -> None:
    """Leave the log of so many steps, as a training under way or as a finished one."""
    assert outcome.trained is not None
    final = outcome.trained.path
    directory = final if is_over else partial_path(final)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "log.jsonl").write_text("".join(log_line(step) for step in range(num_steps)))
    if is_over:
        (partial_path(final) / "log.jsonl").unlink(missing_ok=True)
        write_json(final / "summary.json", {"steps": num_steps, "device": "cpu"})
        write_json(final / "_SUCCESS", {"finished": BEGUN + 5000})


def evaluate(outcome: CellOutcome) -> None:
    write_json(outcome.evaluated.path / "scores.json", {"chrf++": {"score": 0.25}})
    write_json(outcome.evaluated.path / "_SUCCESS", {"finished": BEGUN + 6000})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return connect(tmp_path_factory.mktemp("store") / "run")


@pytest.fixture
def record(client: MlflowClient, tmp_path: Path) -> dict[str, Any]:
    return new_record(client, tmp_path)


def new_record(client: MlflowClient, place: Path) -> dict[str, Any]:
    experiment = client.create_experiment(f"e{next(_NUMBERS)}", (place / "artifacts").as_uri())
    return {"experiment_id": experiment, "parent": client.create_run(experiment).info.run_id}


def only_child(client: MlflowClient, record: dict[str, Any]) -> Run:
    (found,) = child_runs(client, record)
    return found


def steps_and_times(client: MlflowClient, run: Run, curve: str = "loss") -> list[tuple[int, int]]:
    points = client.get_metric_history(run.info.run_id, curve)
    return sorted((point.step, point.timestamp) for point in points)


def expected_times(steps: Iterator[int] | range) -> list[tuple[int, int]]:
    return [(step, round(1000 * (BEGUN + STEP_SECONDS * (step + 1)))) for step in steps]


@given(st.none() | st.booleans() | st.text() | st.floats() | st.integers(-(2**53), 2**53))
def test_only_finite_numbers_become_metrics(value):
    metrics = list(_metric("name", value, 0, 0))

    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    assert len(metrics) == (is_number and abs(value) < float("inf"))


@pytest.mark.parametrize("name", ["chrf++", "a+b", "plain"])
def test_metric_names_hold_no_plus_sign(name: str):
    assert "+" not in _safe(name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_steps=st.integers(1, 3000), looks=st.lists(st.integers(0, 3000), max_size=4))
def test_a_log_read_while_it_grows_gives_the_points_of_the_whole(
    num_steps: int, looks: list[int], tmp_path: Path
):
    lines = [f'{{"step": {step}}}\n' for step in range(num_steps)]
    trained = tmp_path / "train-f"
    log = partial_path(trained) / "log.jsonl"
    log.parent.mkdir(exist_ok=True)
    seen: list[int] = []

    for size in [*sorted(looks), num_steps]:
        cut = lines[: size + 1][-1][:5] if size < num_steps else ""  # a line under way
        log.write_text("".join(lines[:size]) + cut)
        first = seen[-1] + 1 if seen else 0
        seen += [entry["step"] for entry in curve_points(trained, num_steps, first)]

    assert seen == sorted(set(seen))
    assert seen == [entry["step"] for entry in curve_points(trained, num_steps)]
    assert seen[0] == 0
    assert seen[-1] == num_steps - 1
    assert len(seen) == num_steps or NUM_POINTS / 2 <= len(seen) <= NUM_POINTS + 1


def test_a_training_without_a_log_has_no_points(tmp_path: Path):
    assert list(curve_points(tmp_path / "train-f", 10)) == []


def test_a_cell_is_followed_while_it_trains_and_recorded_whole_at_its_end(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    outcome, runs = planned(tmp_path, 6), CellRuns(client, record)

    runs.follow(outcome)
    opened = only_child(client, record)
    train(outcome, 4)
    runs.follow(outcome)
    under_way = only_child(client, record)
    train(outcome, 6, is_over=True)
    evaluate(outcome)
    runs.record(outcome)
    recorded = only_child(client, record)

    assert [run.info.status for run in (opened, under_way, recorded)] == [
        "RUNNING", "RUNNING", "FINISHED",
    ]  # fmt: skip
    assert under_way.data.metrics["loss"] == 2.0
    assert "general_loss" not in under_way.data.metrics
    assert steps_and_times(client, recorded) == expected_times(range(6))
    assert recorded.data.metrics["tokens_per_second"] == 100 / STEP_SECONDS
    assert recorded.data.metrics["chrf_plus_plus"] == 0.25
    assert recorded.data.params["arm"] == "tell"
    assert recorded.info.end_time == 1000 * (BEGUN + 6000)


def test_a_cell_found_finished_has_the_times_of_its_training(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    outcome = planned(tmp_path, 3)
    train(outcome, 3, is_over=True)
    evaluate(outcome)

    CellRuns(client, record).record(outcome)

    run = only_child(client, record)
    assert (run.info.start_time, run.info.end_time) == (1000 * BEGUN, 1000 * (BEGUN + 6000))
    assert steps_and_times(client, run) == expected_times(range(3))
    assert steps_and_times(client, run, "training/steps") == [(0, 1000 * (BEGUN + 5000))]
    assert steps_and_times(client, run, "ledger/task_tokens") == [(0, 1000 * BEGUN)]


def test_a_log_of_an_earlier_version_has_the_time_of_its_stage(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    outcome = planned(tmp_path, 1)
    train(outcome, 1, is_over=True)
    assert outcome.trained is not None
    line = json.loads(log_line(0))
    del line["finished"]
    (outcome.trained.path / "log.jsonl").write_text(json.dumps(line) + "\n")
    evaluate(outcome)

    CellRuns(client, record).record(outcome)

    run = only_child(client, record)
    assert run.info.start_time == 1000 * (BEGUN + 5000)
    assert steps_and_times(client, run) == [(0, 1000 * (BEGUN + 5000))]


def test_a_training_that_was_killed_and_went_on_has_each_step_once_in_one_run(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    outcome = planned(tmp_path, 6)
    train(outcome, 4)
    CellRuns(client, record).follow(outcome)
    end_child_runs(client, record, "KILLED")
    killed = only_child(client, record)
    train(outcome, 6, is_over=True)
    assert outcome.trained is not None
    again = [log_line(step, finished=BEGUN + 4000 + step) for step in range(2, 6)]
    log = outcome.trained.path / "log.jsonl"
    log.write_text("".join([log_line(0), log_line(1), *again]))  # from its checkpoint of step 2
    evaluate(outcome)

    CellRuns(client, record).record(outcome)

    run = only_child(client, record)
    assert (killed.info.status, run.info.status) == ("KILLED", "FINISHED")
    later = [(step, round(1000 * (BEGUN + 4000 + step))) for step in (4, 5)]
    assert steps_and_times(client, run) == expected_times(range(4)) + later


def test_a_cell_without_training_is_recorded_too(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    outcome = planned(tmp_path, 0, "base")
    evaluate(outcome)

    CellRuns(client, record).record(outcome)

    assert only_child(client, record).data.metrics["chrf_plus_plus"] == 0.25


class Cut:
    """A client whose calls fail at given places, the answer lost or nothing done at all."""

    def __init__(self, client: MlflowClient, place: int, *, is_answer_lost: bool) -> None:
        self._client, self._left, self._is_answer_lost = client, place, is_answer_lost

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def cut(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left >= 0:
                return call(*arguments, **named)
            if self._is_answer_lost:
                call(*arguments, **named)
            raise MlflowException("cut")

        return cut


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=3))
def test_cut_anywhere_and_begun_again_each_cell_and_each_point_is_there_once(
    cuts: list[tuple[int, bool]], client: MlflowClient, tmp_path_factory: pytest.TempPathFactory
):
    place = tmp_path_factory.mktemp("cut")
    record, outcome = new_record(client, place), planned(place, 5)
    train(outcome, 5, is_over=True)
    evaluate(outcome)

    for number, is_answer_lost in cuts:
        cut = Cut(client, number, is_answer_lost=is_answer_lost)
        try:
            CellRuns(cut, record).record(outcome)  # type: ignore[arg-type]
        except MlflowException:
            continue
    CellRuns(client, record).record(outcome)

    run = only_child(client, record)
    assert run.info.status == "FINISHED"
    assert steps_and_times(client, run) == expected_times(range(5))
    files = {file.path for file in client.list_artifacts(run.info.run_id, "evaluate")}
    assert files == {"evaluate/scores.json", "evaluate/_SUCCESS"}


def test_runs_of_cells_that_are_over_stay_as_they_are_when_the_rest_is_ended(
    client: MlflowClient, record: dict[str, Any], tmp_path: Path
):
    done, open_one = planned(tmp_path / "1", 0, "base"), planned(tmp_path / "2", 5)
    evaluate(done)
    runs = CellRuns(client, record)
    runs.record(done)
    runs.follow(open_one)

    end_child_runs(client, record, "FAILED")

    found = {run.info.run_name: run.info.status for run in child_runs(client, record)}
    assert found == {done.cell.name: "FINISHED", open_one.cell.name: "FAILED"}
