import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tell_core.errors import TrainingError
from tell_core.lanes import STOP_SECONDS, ProgressFile, in_lane, open_lanes, stop_lanes


def whoami() -> tuple[int, int]:
    return os.getpid(), os.getpgid(0)


def sleep_long(marker: Path) -> None:
    marker.write_text(str(os.getpid()))
    time.sleep(600)


def end_from_outside() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise TimeoutError("from the work itself")


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_lane_leads_a_process_group_of_its_own():
    with open_lanes(1):
        pid, group = in_lane(whoami)

    assert pid == group != os.getpgid(0)


def test_without_lanes_the_work_is_done_here():
    assert in_lane(whoami)[0] == os.getpid()


def test_a_lane_killed_from_outside_is_explained():
    with open_lanes(1), pytest.raises(TrainingError, match="ended from outside"):
        in_lane(end_from_outside)


def test_an_error_of_the_work_reaches_the_caller():
    with open_lanes(1), pytest.raises(TimeoutError, match="from the work itself"):
        in_lane(fail)


def test_lanes_end_when_their_owner_is_killed(tmp_path: Path):
    marker = tmp_path / "pid"
    code = (
        "from pathlib import Path\n"
        "from tell_core.lanes import in_lane, open_lanes\n"
        "from tests.tell_core.test_lanes import sleep_long\n"
        "if __name__ == '__main__':\n"
        "    with open_lanes(1):\n"
        f"        in_lane(sleep_long, Path({str(marker)!r}))\n"
    )
    script = tmp_path / "owner.py"
    script.write_text(code)
    owner = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    wait_until(marker.exists)
    wait_until(lambda: marker.read_text())
    lane = int(marker.read_text())

    owner.kill()
    owner.wait()

    wait_until(lambda: not psutil.pid_exists(lane), seconds=10)
    assert not psutil.pid_exists(lane)


def checkpoint_when_asked(marker: Path) -> None:
    """As a training does: asked to stop it goes on to its checkpoint, then raises."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    marker.write_text("training")
    asked.wait(600)
    time.sleep(1.5)
    marker.write_text("checkpoint written")
    signal.signal(signal.SIGTERM, before)
    raise TrainingError("asked to stop")


def test_lanes_that_are_stopped_end_as_soon_as_their_checkpoint_is_written(tmp_path: Path):
    marker = tmp_path / "marker"
    with open_lanes(2), ThreadPoolExecutor() as pool:
        lane, _ = in_lane(whoami)
        training = pool.submit(in_lane, checkpoint_when_asked, marker)
        wait_until(marker.exists)
        asked_at = time.monotonic()

        stop_lanes()

        took = time.monotonic() - asked_at
        assert marker.read_text() == "checkpoint written"
        assert took < STOP_SECONDS / 2
        assert not psutil.pid_exists(lane) or psutil.Process(lane).status() == "zombie"
        with pytest.raises(TrainingError):
            training.result()


def nap(marker: Path) -> None:
    marker.write_text("work was begun")
    time.sleep(20)


def test_a_stop_reaches_lanes_that_are_only_starting(tmp_path: Path):
    marker = tmp_path / "marker"
    with open_lanes(1), ThreadPoolExecutor() as pool:
        work = pool.submit(in_lane, nap, marker)
        wait_until(multiprocessing.active_children)

        stop_lanes()

        with pytest.raises(TrainingError, match="stopped"):
            work.result(timeout=15)
    assert not marker.exists()


def test_progress_is_read_back(tmp_path: Path):
    file = ProgressFile(tmp_path / "p.json")
    assert file.read() is None

    file("training", 3, 10)

    assert file.read() == ("training", 3, 10)
