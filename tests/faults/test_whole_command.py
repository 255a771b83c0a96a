"""`tell run` with a part of it killed: flow, training, Prefect's server; then it is run again."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.whole_run import differences, outputs
from tests.flows.test_cli import processes_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

_STEP_SECONDS = 300.0  # a busy machine may take so long to start Python and a server
_END_SECONDS = 600.0  # its server gone, a run does its cells; then Prefect tries for minutes
_GONE_SECONDS = 15.0

Part = Callable[[psutil.Process], list[psutil.Process]]


def start(spec: Path, root: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(root)]
    return subprocess.Popen([*command, "--no-track"], stderr=subprocess.DEVNULL)


def children(root: psutil.Process, *words: str) -> list[psutil.Process]:
    """Processes below ``root`` whose command holds all the words."""
    found = []
    for process in root.children(recursive=True):
        with suppress(psutil.Error):
            if all(word in " ".join(process.cmdline()) for word in words):
                found.append(process)
    return found


PARTS: dict[str, Part] = {
    "flow": lambda root: [root],
    "server": lambda root: children(root, "prefect", "server"),
    "training": lambda root: children(root, "multiprocessing.spawn", "spawn_main"),
}


def num_sealed(root: Path) -> int:
    return len(list(root.glob("stages/*[0-9a-f]/_SUCCESS")))


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_ends_the_run_leaves_no_process_and_costs_no_bit(
    part: str, drill_spec: Path, unbroken: Path, tmp_path: Path
):
    root, moments = tmp_path / "tiny", random.Random(part)
    run = start(drill_spec, root)
    later = moments.randint(3, 12)
    wait_until(lambda: num_sealed(root) >= later or run.poll() is not None, _STEP_SECONDS)
    time.sleep(moments.uniform(0.0, 0.5))
    victims = PARTS[part](psutil.Process(run.pid))

    for victim in victims:
        victim.kill()
    code = run.wait(_END_SECONDS)
    wait_until(lambda: not processes_of(tmp_path), _GONE_SECONDS)
    again = start(drill_spec, root)

    assert victims
    assert code != 0
    assert again.wait(_STEP_SECONDS) == 0
    assert differences(outputs(root), outputs(unbroken)) == []
    assert not processes_of(tmp_path)
