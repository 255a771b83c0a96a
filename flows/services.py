"""Prefect server, MLflow server, worker and deployments on this machine: up, down, status.

Every process is written down as soon as it is started, with the moment of its start, so that `down`
ends just those, whatever else runs, and never another process that got the same number later.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from flows.serving import HOST, STOP_SECONDS, answers, await_answer, prefect_environment
from tell_core.errors import InputError, TellError
from tell_core.results import sole_owner
from tell_core.store import read_json, write_json

WORK_POOL = "local"
# Flows that train wait for one another here: one machine, one training run at a time.
GPU_QUEUE = "gpu"
_STATE = "services.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 22
_PORT_SECONDS = 10.0  # within which the system frees the port of a process that was killed
Say = Callable[[str], None]


@dataclass(frozen=True)
class Running:
    """A process that `up` started.

    Attributes:
        name: prefect, mlflow or worker.
        pid: Process id, also that of its group.
        started: `start_mark` of it, which tells it from a later process of the same number.
        address: Where a person finds its page; empty for the worker.
        log: File of its output.
    """

    name: str
    pid: int
    started: str
    address: str
    log: str

    @property
    def process(self) -> psutil.Process | None:
        """The process, or None when it has ended."""
        try:
            process = psutil.Process(self.pid)
            is_same = start_mark(process) == self.started
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def start_mark(process: psutil.Process) -> str:
    """What no other process of the same number has, however often the clock is set.

    On Linux the boot's id and field 22 of ``/proc/PID/stat``: the start in ticks since the boot
    (proc(5)). A moment of the day would move with the clock there. Elsewhere the moment of the
    start, which other kernels note once and keep.

    Raises:
        psutil.NoSuchProcess: It has ended.
    """
    if not _BOOT_ID.is_file():
        return repr(process.create_time())
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise psutil.NoSuchProcess(process.pid) from error
    # The name, field 2, is in brackets and may hold blanks and brackets of its own.
    ticks = stat.rpartition(")")[2].split()[_START_FIELD - 3]
    return f"{_BOOT_ID.read_text(encoding='ascii').strip()}:{ticks}"


def up(home: Path, prefect_port: int, mlflow_port: int, say: Say) -> list[Running]:
    """Start what is not running yet, wait until it answers, deploy what prefect.yaml lists.

    Args:
        home: Where databases, artifacts and logs are kept.
        prefect_port: Port of Prefect's server and pages.
        mlflow_port: Port of MLflow's.
        say: Called with a line at each step.

    Raises:
        InputError: There is no prefect.yaml here, or a port belongs to another process.
        TellError: A server does not come up, or the deployments are refused.
    """
    if not Path("prefect.yaml").is_file():
        raise InputError(
            f"there is no prefect.yaml in {Path.cwd()}: run `tell up` in the project's directory"
        )
    home.mkdir(parents=True, exist_ok=True)
    with sole_owner(home):
        known = {one.name: one for one in _known(home) if one.process}
        prefect = f"http://{HOST}:{prefect_port}"
        mlflow = f"http://{HOST}:{mlflow_port}"
        environment = _environment(home, prefect_port, mlflow)
        for name, address, command in (
            ("prefect", prefect, ["-m", "prefect", "server", "start"]),
            ("mlflow", mlflow, _mlflow_command(home, mlflow_port)),
        ):
            if name in known and known[name].address != address:
                raise InputError(
                    f"{name} is running at {known[name].address}: `tell down` first to move it"
                )
            if name not in known:
                _require_free_port(name, int(address.rpartition(":")[2]))
                say(f"starting {name}")
                known[name] = _start(home, name, address, command, environment, known)
        _wait(known["prefect"], f"{prefect}/api/health")
        _wait(known["mlflow"], f"{mlflow}/health")
        say("deploying")
        _deploy(environment)
        if "worker" not in known:
            for run in _end_left_runs(f"{prefect}/api"):
                say(f"marked as crashed, as its worker is gone: {run}")
            say("starting worker")
            worker = ["-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
            known["worker"] = _start(home, "worker", "", worker, environment, known)
    return list(known.values())


def down(home: Path) -> list[str]:
    """End every process that `up` started; returns the names of those that were still running."""
    ended = []
    for one in reversed(_known(home)):
        if process := one.process:
            _end(process)
            ended.append(one.name)
    (home / _STATE).unlink(missing_ok=True)
    return ended


def status(home: Path) -> list[dict[str, Any]]:
    """A row per process: whether it runs and answers, where, and how much memory it takes."""
    return [_status_row(one) for one in _known(home)]


def addresses(running: Iterable[Running]) -> dict[str, str]:
    """What to set so that commands on this machine use these servers."""
    found = {one.name: one.address for one in running}
    return {
        "PREFECT_API_URL": f"{found['prefect']}/api",
        "MLFLOW_TRACKING_URI": found["mlflow"],
    }


def _environment(home: Path, prefect_port: int, mlflow: str) -> dict[str, str]:
    own = prefect_environment(home / "prefect", prefect_port) | {
        "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        "MLFLOW_TRACKING_URI": mlflow,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "TELL_HOME": str(Path.cwd()),
    }
    return {"TELL_DATA": "data", "MLFLOW_DISABLE_TELEMETRY": "true"} | dict(os.environ) | own


def _mlflow_command(home: Path, port: int) -> list[str]:
    place = home.absolute() / "mlflow"
    place.mkdir(parents=True, exist_ok=True)
    return [
        "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}",
        "--artifacts-destination", str(place / "artifacts"),
    ]  # fmt: skip


def _known(home: Path) -> list[Running]:
    path = home / _STATE
    return [Running(**entry) for entry in read_json(path)] if path.exists() else []


def _start(
    home: Path,
    name: str,
    address: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    known: Mapping[str, Running],
) -> Running:
    """Start a process in a group of its own and write it down."""
    log = home / f"{name}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    started = start_mark(psutil.Process(process.pid))
    running = Running(name, process.pid, started, address, str(log))
    write_json(home / _STATE, [asdict(one) for one in [*known.values(), running]])
    return running


def _require_free_port(name: str, port: int) -> None:
    """Refuse a port that a process holds; one that a killed process leaves is free in a moment."""
    deadline = time.monotonic() + _PORT_SECONDS
    while error := _refusal(port):
        holder = _holder(port)
        if holder or time.monotonic() > deadline:
            raise InputError(
                f"port {port} for {name} is in use{holder}: end that, or choose another with"
                f" --{name}-port"
            ) from error
        time.sleep(0.2)


def _refusal(port: int) -> OSError | None:
    """Why the port cannot be listened on, or None when it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None


def _holder(port: int) -> str:
    with suppress(psutil.Error, PermissionError):
        for connection in psutil.net_connections("tcp"):
            is_here = connection.laddr and connection.laddr.port == port
            if is_here and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return ""


def _wait(one: Running, health: str) -> None:
    if await_answer(health, lambda: one.process is not None):
        return
    what = "does not answer" if one.process else "ended at once"
    raise TellError(f"{one.name} {what}; its log is {one.log}. `tell down` ends what was started")


def _deploy(environment: Mapping[str, str]) -> None:
    for command in (
        ["work-pool", "create", WORK_POOL, "--type", "process", "--overwrite"],
        ["--no-prompt", "deploy", "--all"],
        ["work-queue", "set-concurrency-limit", GPU_QUEUE, "1", "--pool", WORK_POOL],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-800:]
            raise TellError(f"`prefect {' '.join(command)}` failed: {said}")


def _end_left_runs(api: str) -> list[str]:
    """Mark the runs of a worker that is gone; returns their names.

    When a machine goes down, or the worker and its runs are killed together, nobody is left to say
    so: Prefect would count them as running for ever, and the GPU queue would let no other pass. One
    that is just ending says the same of itself.
    """
    left = {"any_": ["PENDING", "RUNNING", "CANCELLING", "PAUSED"]}
    wanted = {
        "flow_runs": {"state": {"type": left}},
        "work_pools": {"name": {"any_": [WORK_POOL]}},
    }
    crashed = {"type": "CRASHED", "message": "Its worker was gone when `tell up` came again."}
    found = httpx.post(f"{api}/flow_runs/filter", json=wanted, timeout=60.0)
    found.raise_for_status()
    runs = found.json()
    for run in runs:
        change = {"state": crashed, "force": True}
        address = f"{api}/flow_runs/{run['id']}/set_state"
        httpx.post(address, json=change, timeout=60.0).raise_for_status()
    return [str(run["name"]) for run in runs]


def _end(process: psutil.Process) -> None:
    """TERM to the process's group, KILL to whoever of it is left after ten seconds."""
    with suppress(psutil.NoSuchProcess):
        members = [process, *process.children(recursive=True)]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        for member in psutil.wait_procs(members, timeout=STOP_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=STOP_SECONDS)


def _status_row(one: Running) -> dict[str, Any]:
    process = one.process
    memory = 0
    if process:
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory += member.memory_info().rss
    return {
        "service": one.name,
        "state": _state(one) if process else "ended",
        "address": one.address,
        "pid": one.pid,
        "memory_megabytes": round(memory / 1e6),
        "log": one.log,
    }


def _state(one: Running) -> str:
    if not one.address:
        return "running"
    health = f"{one.address}{'/api' if one.name == 'prefect' else ''}/health"
    return "answers" if answers(health) else "running, but does not answer"
