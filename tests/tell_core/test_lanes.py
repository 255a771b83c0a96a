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
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.errors import TrainingError
from tell_core.lanes import (
    STOP_SECONDS,
    VISIBLE_GPUS,
    ProgressFile,
    gpus_of_lanes,
    in_lane,
    num_lanes,
    open_lanes,
    stop_lanes,
)
from tell_core.spec.model import TrainingSpec
from tell_core.training.stopping import STOP_VARIABLE


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


def ignore_requests(marker: Path) -> None:
    """As a training does whose checkpoint takes long."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    marker.write_text(os.environ[STOP_VARIABLE])
    time.sleep(600)


def test_a_lane_is_killed_after_the_seconds_that_the_environment_says_and_is_told_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "marker"
    monkeypatch.setenv(STOP_VARIABLE, "1.5")
    with open_lanes(1), ThreadPoolExecutor() as pool:
        training = pool.submit(in_lane, ignore_requests, marker)
        wait_until(lambda: marker.exists() and marker.read_text())
        asked_at = time.monotonic()

        stop_lanes()

        with pytest.raises(TrainingError, match="stopped"):
            training.result()
        assert 1.5 <= time.monotonic() - asked_at < STOP_SECONDS
    assert marker.read_text() == "1.5"


def on_gpus(patch: pytest.MonkeyPatch, count: int, visible: str | None) -> None:
    """As on a machine on which torch sees so many GPUs."""
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.delenv(VISIBLE_GPUS, raising=False)
    if visible is not None:
        patch.setenv(VISIBLE_GPUS, visible)


@given(
    count=st.integers(1, 9), num_ranks=st.integers(1, 9), device=st.sampled_from(["auto", "cuda"])
)
def test_every_lane_has_as_many_gpus_as_a_training_has_ranks_and_shares_none(
    count: int, num_ranks: int, device: str
):
    training = TrainingSpec(device=device, num_ranks=num_ranks)
    with pytest.MonkeyPatch.context() as patch:
        on_gpus(patch, count, None)

        lanes = [own.split(",") for own in gpus_of_lanes(training)]
        assert num_lanes(training) == len(lanes) == max(1, count // num_ranks)

    assert {len(own) for own in lanes} == {min(num_ranks, count)}
    given_away = [gpu for own in lanes for gpu in own]
    assert len(set(given_away)) == len(given_away)
    assert set(given_away) <= {str(index) for index in range(count)}


def test_lanes_take_gpus_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch):
    on_gpus(monkeypatch, 3, "GPU-7f,5,GPU-2a")

    assert gpus_of_lanes(TrainingSpec()) == ["GPU-7f", "5", "GPU-2a"]
    assert gpus_of_lanes(TrainingSpec(num_ranks=2)) == ["GPU-7f,5"]


@pytest.mark.parametrize(("count", "device"), [(0, "auto"), (4, "cpu")])
def test_without_gpus_or_beside_them_lanes_are_by_cpus(
    count: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    on_gpus(monkeypatch, count, None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    assert gpus_of_lanes(TrainingSpec(device=device)) == []
    assert num_lanes(TrainingSpec(device=device, threads=2, num_ranks=2)) == 2


def see_gpus(barrier: Path) -> str:
    """What this lane sees, once another lane is there too."""
    (barrier / str(os.getpid())).touch()
    wait_until(lambda: len(list(barrier.iterdir())) == 2)
    return os.environ[VISIBLE_GPUS]


def test_two_lanes_see_a_gpu_each_from_their_beginning_to_their_end(tmp_path: Path):
    with open_lanes(2, ["GPU-7f", "5"]), ThreadPoolExecutor() as pool:
        both = [pool.submit(in_lane, see_gpus, tmp_path) for _ in range(2)]

        assert sorted(seen.result() for seen in both) == ["5", "GPU-7f"]
        assert in_lane(os.getenv, VISIBLE_GPUS) in {"5", "GPU-7f"}


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
