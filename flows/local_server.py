"""A private Prefect server for one run: started for it, ended with it.

Without any server Prefect keeps the records in a helper process and loses a third of the task
runs (docs/adr/0003-private-prefect-server.md); so a run that is told of no server brings its own.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from flows.serving import HOST, STOP_SECONDS, await_answer, prefect_environment
from tell_core.errors import TellError
from tell_core.results import sole_owner


class ServerLostError(TellError):
    """The private server ended before its run; Prefect still holds records for it."""


@contextmanager
def prefect_server(home: Path) -> Iterator[Callable[[], None]]:
    """Have the Prefect server named by PREFECT_API_URL, or a private one, while the block runs.

    The private server starts in the background, for other work to go on meanwhile. Its address is
    in the environment when the block begins: Prefect must be imported inside the block.

    Args:
        home: Where a private server keeps its database, so that its history stays.

    Yields:
        A function that waits until the server answers; it raises TellError when it does not.

    Raises:
        StoreError: Another run has a server on this database.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield lambda: None
        return
    home.mkdir(parents=True, exist_ok=True)
    with sole_owner(home):
        yield from _private_server(home)


def _private_server(home: Path) -> Iterator[Callable[[], None]]:
    """The private server, two of which must never share a database."""
    log = home / "server.log"
    process, address = _start(home, log)
    os.environ |= {"PREFECT_API_URL": address, "PREFECT_HOME": str(home.absolute())}
    try:
        yield lambda: _wait_until_healthy(process, address, log)
    except httpx.HTTPError as error:
        if process.poll() is None:
            raise
        raise ServerLostError(
            f"the private Prefect server ended in the middle of the run with code"
            f" {process.returncode}; its log is {log}. What was finished is kept: run the same"
            " command again"
        ) from error
    finally:
        del os.environ["PREFECT_API_URL"], os.environ["PREFECT_HOME"]
        _stop(process)


def _start(home: Path, log: Path) -> tuple["subprocess.Popen[bytes]", str]:
    port = _free_port()
    environment = os.environ | prefect_environment(home, port)
    watched = [sys.executable, "-m", "flows.tethered", str(os.getpid()), sys.executable]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*watched, "-m", "prefect", "server", "start"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, f"http://{HOST}:{port}/api"


def _wait_until_healthy(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    if await_answer(f"{address}/health", lambda: process.poll() is None):
        return
    ended = f"ended with code {process.returncode}" if process.poll() is not None else "is silent"
    raise TellError(
        f"the private Prefect server {ended}; its log is {log}. Start one yourself (prefect server"
        " start) and set PREFECT_API_URL to use it."
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
