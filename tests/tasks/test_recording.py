"""Recording while cells train: seen at once, and never waited for."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tasks import recording
from tasks.cell_news import tell_begun, tell_failed, tell_finished
from tasks.cell_runs import CellRuns, child_runs
from tasks.recording import recorded_meanwhile
from tasks.stores import tracking_uri
from tasks.tracking import brief_requests, connect, end_experiment
from tell_core.store import write_json
from tests.tasks.test_cell_runs import evaluate, planned, train

SECONDS = 20.0  # longest wait for the recorder's thread on a busy machine


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all, since making one takes seconds."""
    place = tmp_path_factory.mktemp("store")
    connect(place / "run")
    return f"sqlite:///{place / 'mlflow.db'}"


@pytest.fixture
def root(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(recording, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(recording, "LONGEST_PAUSE_SECONDS", 0.2)
    return tmp_path / "run"


@pytest.fixture
def client(root: Path) -> MlflowClient:
    return connect(root)


@pytest.fixture
def record(client: MlflowClient, root: Path) -> dict[str, Any]:
    experiment = client.create_experiment(root.parent.name, (root / "artifacts").as_uri())
    record = {
        "uri": tracking_uri(root),
        "experiment_id": experiment,
        "parent": client.create_run(experiment).info.run_id,
    }
    write_json(root / "tracking.json", record)
    return record


def statuses(client: MlflowClient, record: dict[str, Any]) -> dict[str, str]:
    return {run.info.run_name: run.info.status for run in child_runs(client, record)}


def test_a_cell_is_seen_while_it_trains_and_over_when_it_is(
    client: MlflowClient, record: dict[str, Any], root: Path
):
    outcome = planned(root, 5)
    name = outcome.cell.name

    with recorded_meanwhile(root, record):
        tell_begun(lambda: outcome)
        wait_until(lambda: statuses(client, record) == {name: "RUNNING"})
        train(outcome, 3)
        wait_until(lambda: "loss" in next(child_runs(client, record)).data.metrics)
        train(outcome, 5, is_over=True)
        evaluate(outcome)
        tell_finished(outcome)
        wait_until(lambda: statuses(client, record) == {name: "FINISHED"})

    measured = client.get_run(record["parent"]).data.metrics
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(measured)
    assert not any(thread.name == "recorder" for thread in threading.enumerate())


def test_a_cell_that_failed_is_marked_while_others_go_on(
    client: MlflowClient, record: dict[str, Any], root: Path
):
    outcome = planned(root, 5)

    with recorded_meanwhile(root, record):
        tell_begun(lambda: outcome)
        tell_failed(outcome.cell)
        wait_until(lambda: statuses(client, record) == {outcome.cell.name: "FAILED"})


@pytest.mark.parametrize("status", ["KILLED", "FAILED"])
def test_a_run_that_did_not_finish_leaves_no_child_running(
    status: Any, client: MlflowClient, record: dict[str, Any], root: Path
):
    outcome = planned(root, 5)
    with recorded_meanwhile(root, record):
        tell_begun(lambda: outcome)
        wait_until(lambda: statuses(client, record))

    end_experiment(root, status)

    assert statuses(client, record) == {outcome.cell.name: status}
    assert client.get_run(record["parent"]).info.status == status


def test_a_store_that_hangs_costs_the_stated_seconds_and_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    answered = threading.Event()
    monkeypatch.setattr(recording, "connect", lambda _root: answered.wait(60))
    monkeypatch.setattr(recording, "CLOSE_SECONDS", 0.5)
    outcome, started = planned(root, 5), time.monotonic()

    with recorded_meanwhile(root, {"parent": "none"}):
        for _ in range(1000):
            tell_begun(lambda: outcome)
            tell_finished(outcome)
        told = time.monotonic() - started
    closed = time.monotonic() - started
    answered.set()

    assert told < 0.5
    assert 0.5 <= closed < 2.0


def test_a_store_that_was_away_gets_everything_when_it_is_back(
    client: MlflowClient, record: dict[str, Any], root: Path, monkeypatch, caplog
):
    tries: list[int] = []

    def away(_root: Path) -> MlflowClient:
        tries.append(1)
        raise MlflowException("away")

    outcome = planned(root, 5)
    train(outcome, 5, is_over=True)
    evaluate(outcome)
    monkeypatch.setattr(recording, "connect", away)

    with caplog.at_level(logging.WARNING), recorded_meanwhile(root, record):
        tell_begun(lambda: outcome)
        tell_finished(outcome)
        wait_until(lambda: len(tries) > 5)
        monkeypatch.setattr(recording, "connect", lambda _root: client)
        wait_until(lambda: statuses(client, record) == {outcome.cell.name: "FINISHED"})

    assert [line.message for line in caplog.records if "training goes on" in line.message] == [
        "MLflow: recorded later, training goes on (away)"
    ]


def test_news_that_cannot_be_recorded_keep_no_other_from_being_recorded(
    client: MlflowClient, record: dict[str, Any], root: Path
):
    broken, outcome = planned(root / "1", 5), planned(root / "2", 0, "base")
    evaluate(outcome)

    with recorded_meanwhile(root, record):
        tell_finished(broken)  # it has no files
        tell_finished(outcome)
        wait_until(lambda: statuses(client, record).get(outcome.cell.name) == "FINISHED")


class Slow:
    """A client each of whose requests takes a while."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.began: list[float] = []

    def __getattr__(self, name: str) -> Any:
        def slow(*arguments: Any, **named: Any) -> Any:
            self.began.append(time.monotonic())
            time.sleep(0.3)
            return getattr(self._client, name)(*arguments, **named)

        return slow


def test_a_thread_that_is_left_behind_begins_no_request_while_the_end_records_the_same(
    client: MlflowClient, record: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
):
    outcome, slow = planned(root, 5), Slow(client)
    train(outcome, 5, is_over=True)
    evaluate(outcome)
    monkeypatch.setattr(recording, "connect", lambda _root: slow)
    monkeypatch.setattr(recording, "CLOSE_SECONDS", 0.6)
    monkeypatch.setattr(recording, "BRIEF_SECONDS", 0.4)

    with recorded_meanwhile(root, record):
        tell_finished(outcome)
        wait_until(lambda: len(slow.began) > 1)  # it has begun to record the cell
        leaving = time.monotonic()
    closed = time.monotonic()
    CellRuns(client, record).record(outcome)
    wait_until(lambda: not any(thread.name == "recorder" for thread in threading.enumerate()))

    assert closed < leaving + 2.0
    assert max(slow.began) < leaving + 0.8
    assert statuses(client, record) == {outcome.cell.name: "FINISHED"}
    assert len(list(child_runs(client, record))) == 1


def test_where_nothing_is_tracked_nothing_is_started(root: Path):
    with recorded_meanwhile(root, None):
        assert not any(thread.name == "recorder" for thread in threading.enumerate())


@given(before=st.none() | st.sampled_from(["3", "7"]), is_failing=st.booleans())
def test_requests_are_brief_within_the_block_and_as_before_after_it(
    before: str | None, is_failing: bool
):
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(name, raising=False)
        if before:
            patch.setenv(name, before)

        try:
            with brief_requests():
                within = os.environ[name]
                if is_failing:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass

        assert within == "0"
        assert os.environ.get(name) == before
