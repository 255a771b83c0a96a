"""What `tell up` starts and `tell down` ends, on processes that cost nothing; once for real."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from typer.testing import CliRunner

from flows import services
from flows.cli import app
from tell_core.errors import InputError, TellError
from tell_core.store import read_json, write_json

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = {
    "experiment", "nightly-curation", "weekly-sweep", "recheck-champion", "promote", "demo",
}  # fmt: skip
SLEEP = ["-c", "import time; time.sleep(60)"]


def start(home: Path, name: str, command: list[str] = SLEEP) -> services.Running:
    known = {one.name: one for one in services._known(home)}
    return services._start(home, name, "", command, os.environ, known)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_down_ends_what_was_started_with_its_children_and_nothing_else(tmp_path: Path):
    other = subprocess.Popen([sys.executable, *SLEEP])
    nap = "import time; time.sleep(60)"
    spawn = f"import subprocess, sys; subprocess.call([sys.executable, '-c', {nap!r}])"
    one = start(tmp_path, "prefect", ["-c", spawn])
    while not (children := psutil.Process(one.pid).children()):
        time.sleep(0.05)

    ended = services.down(tmp_path)

    assert ended == ["prefect"]
    assert one.process is None
    assert not any(child.is_running() for child in children)
    assert other.poll() is None
    assert services.status(tmp_path) == []
    other.kill()
    other.wait()


def test_a_process_that_got_an_old_number_is_left_alone(tmp_path: Path):
    other = subprocess.Popen([sys.executable, *SLEEP])
    time.sleep(0.05)  # five ticks of the kernel's clock
    one = start(tmp_path, "worker")
    services.down(tmp_path)
    record = vars(one) | {"pid": other.pid}
    write_json(tmp_path / "services.json", [record])

    ended = services.down(tmp_path)

    assert ended == []
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_clock_that_was_set_costs_no_process_its_name(tmp_path: Path, monkeypatch):
    one = start(tmp_path, "worker")
    set_back = psutil.boot_time() - 3600
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: set_back)
    monkeypatch.setattr("time.time", lambda now=time.time: now() - 3600)

    states = [row["state"] for row in services.status(tmp_path)]
    ended = services.down(tmp_path)

    assert states == ["running"]
    assert ended == ["worker"]
    assert one.process is None


def test_every_process_has_a_mark_of_its_own_and_keeps_it(tmp_path: Path):
    one, other = start(tmp_path, "prefect"), start(tmp_path, "worker")
    time.sleep(0.05)  # five ticks of the kernel's clock

    again = services.start_mark(psutil.Process(one.pid))

    third = start(tmp_path, "mlflow")
    services.down(tmp_path)
    assert again == one.started
    assert third.started not in {one.started, other.started}


def test_servers_listen_on_loopback_whatever_the_environment_says(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_HOST", "0.0.0.0")

    environment = services._environment(tmp_path, 4200, "http://127.0.0.1:5000")

    assert environment["PREFECT_SERVER_API_HOST"] == "127.0.0.1"


def test_status_tells_running_from_ended(tmp_path: Path):
    start(tmp_path, "worker")
    gone = start(tmp_path, "prefect", ["-c", ""])
    while gone.process:
        time.sleep(0.05)

    states = {row["service"]: row["state"] for row in services.status(tmp_path)}

    services.down(tmp_path)
    assert states == {"worker": "running", "prefect": "ended"}


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path):
    one = start(tmp_path, "mlflow", ["-c", "raise SystemExit(3)"])

    with pytest.raises(TellError, match=r"mlflow ended at once; its log is .*mlflow\.log"):
        services._wait(one, "http://127.0.0.1:9/health")


def test_a_port_in_use_is_refused_with_the_mend(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} for prefect is in use.*--prefect-port"):
            services.up(tmp_path, port, free_port(), print)


def test_a_port_that_nobody_holds_any_more_is_waited_for(monkeypatch):
    refusals = iter([OSError("in use"), OSError("in use"), None])
    monkeypatch.setattr(services, "_refusal", lambda _: next(refusals))
    monkeypatch.setattr(services, "_holder", lambda _: "")

    services._require_free_port("prefect", 4200)

    assert next(refusals, "none left") == "none left"


def test_without_a_project_nothing_is_started(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(app, ["up"])

    assert result.exit_code == 2
    assert "prefect.yaml" in result.stderr


@pytest.mark.slow
def test_servers_worker_and_deployments_come_up_and_a_killed_server_comes_back(
    tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(PROJECT)
    prefect, mlflow = free_port(), free_port()
    try:
        first = {one.name: one for one in services.up(tmp_path, prefect, mlflow, print)}
        with SyncPrefectClient(f"http://127.0.0.1:{prefect}/api") as client:
            deployed = {deployment.name for deployment in client.read_deployments()}
        psutil.Process(first["prefect"].pid).kill()
        while first["prefect"].process:
            time.sleep(0.05)
        again = {one.name: one for one in services.up(tmp_path, prefect, mlflow, print)}
        states = {row["service"]: row["state"] for row in services.status(tmp_path)}
    finally:
        services.down(tmp_path)

    assert deployed == DEPLOYMENTS
    assert again["mlflow"].pid == first["mlflow"].pid
    assert again["prefect"].pid != first["prefect"].pid
    assert states == {"prefect": "answers", "mlflow": "answers", "worker": "running"}
    assert not (tmp_path / "services.json").exists()
    assert all(one.process is None for one in again.values())


def test_the_state_is_written_before_anything_is_waited_for(tmp_path: Path):
    one = start(tmp_path, "prefect")

    (record,) = read_json(tmp_path / "services.json")

    assert record["pid"] == one.pid
    services.down(tmp_path)
