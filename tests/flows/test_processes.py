"""What is left of a run that is killed, cancelled, or started twice: nothing that still works."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelling
from prefect.testing.utilities import prefect_test_harness

from tasks.cell_runs import child_runs
from tasks.tracking import read_record
from tell_core.errors import StoreError
from tell_core.results import sole_owner
from tests.fixtures.tiny import write_tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parents[2]
GONE_WITHIN_SECONDS = 10.0
LIMIT_SECONDS = 100  # of a flow, long enough for it to begin to train on a busy machine
NOTED_WITHIN_SECONDS = 60.0  # a killed run is noted by a process that first imports MLflow


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    """Wait for it; returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "waited in vain"
        time.sleep(0.1)
    return time.monotonic() - started


def trainings(root: Path) -> list[psutil.Process]:
    """Processes that have a log of a training in this run directory open."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            paths = [file.path for file in process.open_files()]
            if any(path.startswith(str(root)) and path.endswith("log.jsonl") for path in paths):
                found.append(process)
    return found


def works(process: psutil.Process) -> bool:
    """Whether a process is there and more than an entry in the table of processes."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def status_of(root: Path) -> str:
    record = read_record(root)
    assert record is not None
    return str(mlflow.MlflowClient(record["uri"]).get_run(record["parent"]).info.status)


def statuses_of_cells(root: Path) -> set[str]:
    record = read_record(root)
    if record is None:
        return set()
    found = child_runs(mlflow.MlflowClient(record["uri"]), record)
    return {str(run.info.status) for run in found}


def is_free(root: Path) -> bool:
    with suppress(StoreError), sole_owner(root):
        return True
    return False


def begin(spec: Path, root: Path, *more: str, track: bool = True) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(root), *more]
    return subprocess.Popen(
        [*command, *([] if track else ["--no-track"])], text=True, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def long_spec(tmp_path: Path, tiny_world: Path) -> Path:
    """One cell that trains for hours."""
    return write_tiny_spec(
        tmp_path / "long.yaml",
        tiny_world,
        arms=["sft"],
        seeds=[0],
        budgets={"task_tokens": [200]},
        training={"epochs": 100_000, "learning_rate": 0.001},
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_ends_with_its_run_and_the_tracked_run_is_killed(
    number: signal.Signals, long_spec: Path, tmp_path: Path
):
    root = tmp_path / "run"
    run = begin(long_spec, root)
    wait_until(lambda: trainings(root) or run.poll() is not None, 400)
    assert run.poll() is None, run.communicate()
    lanes = trainings(root)
    wait_until(lambda: statuses_of_cells(root) == {"RUNNING"}, 60)

    run.send_signal(number)

    wait_until(lambda: not any(map(works, lanes)), GONE_WITHIN_SECONDS)
    run.communicate(timeout=30)
    assert is_free(root)
    wait_until(lambda: status_of(root) == "KILLED", NOTED_WITHIN_SECONDS)
    assert statuses_of_cells(root) == {"KILLED"}


def test_two_identical_experiments_at_once_do_the_work_once(tmp_path: Path, tiny_world: Path):
    spec = write_tiny_spec(
        tmp_path / "spec.yaml", tiny_world, arms=["base", "sft"], seeds=[0, 1],
        budgets={"task_tokens": [200]}, training={"learning_rate": 0.001},
    )  # fmt: skip
    root = tmp_path / "run"

    both = [begin(spec, root, track=False) for _ in range(2)]
    said = [process.communicate(timeout=400) for process in both]

    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], said
    assert "another run is working" in said[codes.index(1)][1]
    again = begin(spec, root, track=False)
    assert again.wait(timeout=120) == 0
    assert not list(root.glob("stages/*.partial"))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A Prefect server, a work pool, and a worker on it."""
    with prefect_test_harness(server_startup_timeout=180):
        from prefect.settings import PREFECT_API_URL

        environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
        prefect = [sys.executable, "-m", "prefect"]
        pool = [*prefect, "work-pool", "create", "here", "--type", "process"]
        subprocess.run(pool, env=environment, check=True, capture_output=True)
        process = subprocess.Popen(
            [*prefect, "worker", "start", "--pool", "here", "--type", "process"],
            env=environment, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        yield process
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["cancelled", "worker killed"])
def test_a_training_under_a_worker_ends_with_it_and_with_a_cancellation(
    how: str, worker: "subprocess.Popen[bytes]", long_spec: Path, tmp_path: Path
):
    from prefect.flows import Flow

    root = tmp_path / "run"
    remote = Flow.from_source(str(PROJECT), "flows/experiment.py:run_experiment")
    deployed = remote.deploy(
        "long", work_pool_name="here", print_next_steps=False, ignore_warnings=True
    )
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            deployed, parameters={"spec_file": str(long_spec), "out": str(root)}
        )
        wait_until(lambda: trainings(root), 400)
        lanes = trainings(root)
        asked_at = time.monotonic()

        if how == "cancelled":
            client.set_flow_run_state(run.id, Cancelling(), force=True)
        else:
            worker.kill()

        wait_until(lambda: not any(map(works, lanes)), GONE_WITHIN_SECONDS)
    wait_until(lambda: is_free(root), asked_at + 2 * GONE_WITHIN_SECONDS - time.monotonic())
    wait_until(lambda: status_of(root) == "KILLED", NOTED_WITHIN_SECONDS)


def test_a_run_whose_time_is_over_ends_its_training_and_says_so(
    worker: "subprocess.Popen[bytes]", long_spec: Path, tmp_path: Path
):
    from prefect.flows import Flow

    root = tmp_path / "run"
    (tmp_path / "limited.py").write_text(
        "from flows.request import request_experiment\n"
        f"limited = request_experiment.with_options(timeout_seconds={LIMIT_SECONDS})\n"
    )
    deployed = Flow.from_source(str(tmp_path), "limited.py:limited").deploy(
        "limited", work_pool_name="here", print_next_steps=False, ignore_warnings=True
    )
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            deployed, parameters={"spec_file": str(long_spec), "out": str(root)}
        )
        wait_until(lambda: trainings(root), LIMIT_SECONDS + 60)
        lanes = trainings(root)

        wait_until(lambda: not any(map(works, lanes)), LIMIT_SECONDS + GONE_WITHIN_SECONDS)
        wait_until(lambda: client.read_flow_run(run.id).state.is_final(), 60)
        state = client.read_flow_run(run.id).state

    assert (state.type, state.name) == ("FAILED", "TimedOut")
    assert is_free(root)
    assert status_of(root) == "FAILED"
    assert statuses_of_cells(root) == {"FAILED"}
