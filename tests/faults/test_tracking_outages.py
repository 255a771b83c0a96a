"""MLflow away for a while, for good, answering 500, its SQLite locked: no result depends on it."""

import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import mlflow
import psutil
import pytest
from mlflow.exceptions import MlflowException
from prefect.testing.utilities import prefect_test_harness

from flows import experiment
from flows.experiment import run_experiment
from tasks.cell_news import tell_finished
from tasks.cell_runs import child_runs
from tasks.recording import CLOSE_SECONDS
from tasks.tracking import read_record
from tell_core.errors import InputError, StoreError
from tell_core.pipeline import CellOutcome
from tell_core.store import read_json
from tests.faults.outages import Line, Mode, line_to
from tests.flows.test_services import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOM_BYTES = 20_000_000  # more than the databases of these runs take, less than the file to be kept


@pytest.fixture(scope="module")
def harness() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """An MLflow server, as `tell up` starts it: its port and process id."""
    home, port = tmp_path_factory.mktemp("mlflow"), free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(port), "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"),
            *("--artifacts-destination", str(home / "artifacts")),
        ]
    )
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5.0).is_success
            break
        except httpx.HTTPError:
            assert process.poll() is None
            time.sleep(0.3)
    yield port, process.pid
    process.terminate()
    process.wait(20)


@pytest.fixture
def line(mlflow_server: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The way to that server, which tests cut; clients give up as early as `tell` lets them."""
    with line_to(mlflow_server[0]) as line:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", line.address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        yield line


@pytest.fixture
def root(unbroken: Path, tmp_path: Path) -> Path:
    """A run directory with every stage finished, so that only the recording is left."""
    shutil.copytree(unbroken, tmp_path / "tiny")
    return tmp_path / "tiny"


def at_the_report(monkeypatch: pytest.MonkeyPatch, strike: Callable[[], None]) -> None:
    """Let something happen when all is trained."""
    draw = experiment.report

    def report(root: Path) -> Any:
        drawn = draw(root)
        strike()
        return drawn

    monkeypatch.setattr(experiment, "report", report)


def when_cells_begin(monkeypatch: pytest.MonkeyPatch, strike: Callable[[], None]) -> None:
    """Let something happen, once, before any cell is recorded."""
    run = experiment.run_cells
    left = [strike]

    def run_cells(*arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()()
        return run(*arguments, **named)

    monkeypatch.setattr(experiment, "run_cells", run_cells)


def limit_files(process: psutil.Process, num_bytes: int) -> None:
    """Let no file of a process or its children grow beyond so many bytes, as on a full disk."""
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            hard = one.rlimit(psutil.RLIMIT_FSIZE)[1]
            one.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, hard))


def finished_children(root: Path) -> list[str]:
    return children(root, "FINISHED")


def running_children(root: Path) -> list[str]:
    return children(root, "RUNNING")


def children(root: Path, status: str) -> list[str]:
    record = read_record(root)
    assert record is not None
    found = child_runs(mlflow.MlflowClient(record["uri"]), record)
    return sorted(run.info.run_name for run in found if run.info.status == status)


def cells(root: Path) -> list[str]:
    return sorted(read_json(root / "manifest.json")["cells"])


def test_away_for_a_minute_costs_a_minute_and_nothing_else(
    harness: None, line: Line, root: Path, drill_spec: Path, monkeypatch: pytest.MonkeyPatch
):
    when_cells_begin(monkeypatch, lambda: line.turn_for("away", 60.0))

    try:
        run_experiment(drill_spec, [], root, True)
    except (MlflowException, InputError):
        monkeypatch.undo()
        pytest.fail("the run gave up before the server was back")

    assert line.num_refused > 0
    assert finished_children(root) == cells(root)


@pytest.mark.parametrize("mode", ["away", "answering 500"])
def test_gone_for_good_leaves_results_and_report_and_a_rerun_records_each_cell_once(
    mode: Mode, harness: None, line: Line, root: Path, drill_spec: Path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for name in ("track_cells", "close_experiment"):
        recording = getattr(experiment, name)
        monkeypatch.setattr(experiment, name, recording.with_options(retries=0))
    when_cells_begin(monkeypatch, lambda: line.turn(mode))

    with pytest.raises(InputError, match="cannot be used"):
        run_experiment(drill_spec, [], root, True)
    left = {name: (root / name).is_file() for name in ("results.parquet", "report.html")}
    is_sealed = (root / "finished.json").exists()
    line.turn("passing")
    monkeypatch.setattr(experiment, "report", lambda root: None)
    run_experiment(drill_spec, [], root, True)

    assert left == {"results.parquet": True, "report.html": True}
    assert not is_sealed
    assert (root / "finished.json").exists()
    assert finished_children(root) == cells(root)


@pytest.mark.parametrize("store", ["server", "file"])
def test_a_disk_that_is_full_when_artifacts_are_kept_is_told_and_a_rerun_keeps_them(
    store: str, harness: None, line: Line, root: Path, drill_spec: Path, monkeypatch, mlflow_server
):
    keeper = psutil.Process()
    if store == "file":
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    else:
        keeper = psutil.Process(mlflow_server[1])
    for name in ("track_cells", "close_experiment"):
        monkeypatch.setattr(experiment, name, getattr(experiment, name).with_options(retries=0))
    (root / "predictions" / "large.bin").write_bytes(bytes(2 * ROOM_BYTES))
    at_the_report(monkeypatch, lambda: limit_files(keeper, ROOM_BYTES))

    try:
        with pytest.raises(StoreError, match="run the same command again"):
            run_experiment(drill_spec, [], root, True)
    finally:
        limit_files(keeper, resource.RLIM_INFINITY)
    is_sealed = (root / "finished.json").exists()
    monkeypatch.setattr(experiment, "report", lambda root: None)
    run_experiment(drill_spec, [], root, True)

    assert not is_sealed
    assert (root / "finished.json").exists()
    assert finished_children(root) == cells(root)
    record = read_record(root)
    assert record is not None
    kept = mlflow.MlflowClient(record["uri"]).list_artifacts(record["parent"], "predictions")
    assert ("predictions/large.bin", 2 * ROOM_BYTES) in {(a.path, a.file_size) for a in kept}


def test_cut_in_the_middle_of_recording_no_cell_is_recorded_twice(
    harness: None, line: Line, root: Path, drill_spec: Path, monkeypatch: pytest.MonkeyPatch
):
    cut = threading.Timer(1.5, line.turn_for, ("away", 2.0))
    when_cells_begin(monkeypatch, cut.start)

    run_experiment(drill_spec, [], root, True)

    assert finished_children(root) == cells(root)
    assert running_children(root) == []


def test_away_while_cells_train_they_are_trained_and_each_is_recorded_once(
    harness: None, line: Line, tmp_path: Path, drill_spec: Path, monkeypatch: pytest.MonkeyPatch
):
    root, seen = tmp_path / "tiny", []

    def strike(outcome: CellOutcome) -> None:
        if not seen:
            line.turn_for("away", 20.0)
        seen.append(outcome.cell.name)
        tell_finished(outcome)

    monkeypatch.setattr("flows.cells.tell_finished", strike)

    run_experiment(drill_spec, [], root, True)

    assert line.num_refused > 0
    assert sorted(seen) == cells(root) == finished_children(root)
    assert running_children(root) == []


def test_a_server_that_never_answers_costs_the_cells_nothing_and_their_end_few_seconds(
    harness: None, line: Line, root: Path, drill_spec: Path, monkeypatch: pytest.MonkeyPatch
):
    moments: dict[str, float] = {}

    def note_report() -> None:
        moments["report"] = time.monotonic()

    record = experiment.track_cells

    def track_cells(*arguments: Any) -> Any:
        moments["recording"] = time.monotonic()
        line.turn("passing")
        return record(*arguments)

    when_cells_begin(monkeypatch, lambda: line.turn("hanging"))
    at_the_report(monkeypatch, note_report)
    monkeypatch.setattr(experiment, "track_cells", track_cells)

    run_experiment(drill_spec, [], root, True)

    assert line.num_refused > 0
    assert moments["recording"] - moments["report"] < CLOSE_SECONDS + 5.0
    assert finished_children(root) == cells(root)
    assert running_children(root) == []


def test_a_locked_sqlite_store_is_waited_for(
    harness: None, root: Path, drill_spec: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def hold(seconds: float) -> None:
        with sqlite3.connect(root.parent / "mlflow.db") as other:
            other.execute("begin exclusive")
            time.sleep(seconds)
            other.rollback()

    def lock() -> None:
        threading.Thread(target=hold, args=(25.0,)).start()
        time.sleep(0.5)

    when_cells_begin(monkeypatch, lock)

    run_experiment(drill_spec, [], root, True)

    assert finished_children(root) == cells(root)
