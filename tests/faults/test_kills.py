"""SIGKILL at random moments: the same command finishes the work, with the result it would have."""

import random
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from tests.faults.whole_run import differences, outputs, start_whole

_MEAN_SECONDS = 0.7  # CPU time between kills, a tenth of what the experiment takes


def wait_for_work(process: ForkServerProcess, cpu_seconds: float) -> None:
    """Until the process has worked so long, however busy the machine is, or has ended."""
    watched = psutil.Process(process.pid)
    with suppress(psutil.NoSuchProcess):
        while process.exitcode is None and watched.cpu_times().user < cpu_seconds:
            time.sleep(0.005)


def kill_until_finished(spec: Path, root: Path, moments: random.Random) -> int:
    """Start the experiment again and again, each time killed after a random while.

    Returns:
        How many times it was killed before it came to its end.
    """
    num_kills = 0
    while True:
        process = start_whole(spec, root)
        wait_for_work(process, moments.expovariate(1 / _MEAN_SECONDS))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return num_kills
        process.kill()
        process.join()
        num_kills += 1


@pytest.mark.parametrize(
    "num_kills", [5, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_killed_at_random_moments_a_run_comes_to_the_same_bits(
    num_kills: int, drill_spec: Path, unbroken: Path, tmp_path: Path
):
    moments = random.Random(7)
    killed = 0
    while killed < num_kills:
        root = tmp_path / f"run-{killed}"
        killed += kill_until_finished(drill_spec, root, moments)

        assert differences(outputs(root), outputs(unbroken)) == []
        assert not list(root.glob("stages/*.partial"))
