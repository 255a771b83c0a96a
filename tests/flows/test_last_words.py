"""A run under a worker ends when the worker is gone: whose child it is, and which flows look."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import last_words

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYED = [
    entry["entrypoint"]
    for entry in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
]
ANY_PARAMETERS: dict[str, Any] = {
    "spec_file": Path("none.yaml"),
    "spec_files": [],
    "name": "nobody",
    "version": 1,
    "out": Path("none"),
}


class AskedFirstError(Exception):
    """A flow asked to end with its worker before it did anything."""


@pytest.mark.parametrize("entrypoint", [*DEPLOYED, "flows/experiment.py:run_experiment"])
def test_every_deployed_flow_ends_with_its_worker(
    entrypoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    path, _, name = entrypoint.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    deployed = getattr(module, name)

    def ask() -> None:
        raise AskedFirstError

    monkeypatch.setattr(module, "end_with_worker", ask)
    monkeypatch.chdir(tmp_path)
    needed = deployed.parameters.required

    with pytest.raises(AskedFirstError):
        deployed.fn(**{parameter: ANY_PARAMETERS[parameter] for parameter in needed})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process would send to itself; each look at its parent takes no time."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: sent.append(number))
    monkeypatch.setattr(last_words, "_LOOK_EVERY_SECONDS", 0.0)
    return sent


def parents(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[int]:
    """Let the process have these parents, a look each; returns those not yet looked at."""
    left = list(numbers)
    monkeypatch.setattr(os, "getppid", lambda: left.pop(0))
    return left


def test_a_run_that_lost_its_worker_before_it_began_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, signals: list[int]
):
    monkeypatch.setattr(last_words, "_is_prefect", lambda _pid: False, raising=False)
    parents(monkeypatch)

    last_words._watch(1)

    assert signals == [signal.SIGTERM]


def test_a_worker_that_is_the_first_process_of_its_container_is_watched(
    monkeypatch: pytest.MonkeyPatch, signals: list[int]
):
    monkeypatch.setattr(last_words, "_is_prefect", lambda _pid: True, raising=False)
    left = parents(monkeypatch, 1, 1, 0)

    last_words._watch(1)

    assert not left
    assert signals == [signal.SIGTERM]


def test_the_worker_is_the_parent_at_import_and_not_the_one_that_took_over(
    monkeypatch: pytest.MonkeyPatch,
):
    watched: list[int] = []
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "some")
    monkeypatch.setattr(last_words, "_STARTED_BY", 4321, raising=False)
    monkeypatch.setattr(last_words, "_watch", watched.append)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    start = getattr(last_words.end_with_worker, "__wrapped__", last_words.end_with_worker)

    start()

    assert watched == [4321]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(("started_as", "is_prefect"), [("prefect", True), ("init", False)])
def test_prefect_is_known_by_its_command(started_as: str, is_prefect: bool):
    # It says when it runs: just after its start the system does not know its command yet.
    command = [sys.executable, "-c", "print(flush=True); input()", started_as]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = last_words._is_prefect(process.pid)
        process.communicate(b"\n")

    assert found == is_prefect
