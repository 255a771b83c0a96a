"""What is still done when a run is killed: its MLflow run is marked, its worker's end is its own.

``python -m flows.last_words ROOT`` waits beside a run. It is told when the run ends by itself; when
the pipe to it closes without that, the run was killed and could not say so.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_DONE = b"done"
_LOOK_EVERY_SECONDS = 1.0
_IN_A_WORKER = "PREFECT__FLOW_RUN_ID"
_INIT = 1
# Asked when the flow's file is imported: a worker that ends from then on is seen to be gone.
_STARTED_BY = os.getppid()


@contextmanager
def note_if_killed(root: Path) -> Iterator[None]:
    """Mark the MLflow run of ``root`` as KILLED if this process is killed within the block.

    What waits for that has a session of its own, so that it outlives a signal to this process's
    group; it imports nothing before it is needed.
    """
    command = [sys.executable, "-m", "flows.last_words", str(root.absolute())]
    waiting = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # or it would hold the run's own output open after its end
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert waiting.stdin is not None
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            waiting.stdin.write(_DONE)
            waiting.stdin.close()
        waiting.wait()


@cache  # a flow within a flow needs no second watch
def end_with_worker() -> None:
    """Ask this process to stop when the Prefect worker that started it is gone, however it ended.

    The first line of every deployed flow. Does nothing where no worker started it.
    """
    if os.environ.get(_IN_A_WORKER):
        threading.Thread(
            target=_watch, args=(_STARTED_BY,), name="end-with-worker", daemon=True
        ).start()


def _watch(worker: int) -> None:
    if worker != _INIT or _is_prefect(worker):
        while os.getppid() == worker:
            time.sleep(_LOOK_EVERY_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_prefect(pid: int) -> bool:
    """Whether a process was started as Prefect: in a container a worker, or what starts it, is 1.

    Everywhere else process 1 takes over what lost its parent.
    """
    with suppress(OSError):
        return b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def main() -> None:
    """Wait for the end of the run, and mark it when it was killed."""
    if sys.stdin.buffer.read() == _DONE:
        return
    from tasks.tracking import end_experiment

    end_experiment(Path(sys.argv[1]), "KILLED")


if __name__ == "__main__":
    main()
