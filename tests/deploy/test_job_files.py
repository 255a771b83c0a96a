"""The job files under deploy/: read by their interpreters, and their commands by ours."""

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tell_core.bundles.__main__ import _parser, share_of
from tell_core.training.stopping import STOP_VARIABLE

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SLURM = DEPLOY / "slurm" / "cells.sbatch"
WORKER = """#!/usr/bin/env bash
trap 'echo stopped >> {seen}; exit 143' TERM
echo "$@" >> {seen}
for _ in $(seq {loops}); do sleep 0.1; done
"""


def arguments_of(line: str) -> Any:
    """What `python -m tell_core.bundles` makes of the rest of a command line."""
    words = shlex.split(line)
    return _parser().parse_args(words[words.index("tell_core.bundles") + 1 :])


@pytest.fixture
def job() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "kubernetes" / "cells.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_the_slurm_job_says_how_many_tasks_share_its_gpus():
    """Slurm refuses `--gpus-per-task` without a number of tasks."""
    asked = {line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")}

    assert {"#SBATCH --ntasks=1", "#SBATCH --gpus-per-task=1"} <= asked


def slurm_job(tmp_path: Path, loops: int) -> "subprocess.Popen[str]":
    """The batch script as a node runs it, with stand-ins for python and scontrol."""
    for name, text in {
        "python": WORKER.format(seen=tmp_path / "seen", loops=loops),
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path / "requeued"}\n',
    }.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "BUNDLES": "with space/bundles",
        "MODEL": "model",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    return subprocess.Popen(["bash", str(SLURM)], env=environment, text=True)


def test_the_batch_script_is_bash():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_each_task_of_the_array_takes_its_share(tmp_path: Path):
    assert slurm_job(tmp_path, loops=1).wait(timeout=30) == 0

    line = (tmp_path / "seen").read_text().strip()
    assert line == "-m tell_core.bundles run with space/bundles --model model --share 2/4"
    assert not (tmp_path / "requeued").exists()


def test_a_task_asked_to_stop_waits_for_the_checkpoint_and_is_queued_again(tmp_path: Path):
    job = slurm_job(tmp_path, loops=600)
    while not (tmp_path / "seen").exists():
        time.sleep(0.05)

    job.send_signal(signal.SIGTERM)

    assert job.wait(timeout=30) == 143
    assert (tmp_path / "seen").read_text().endswith("stopped\n")
    assert (tmp_path / "requeued").read_text() == "requeue 7_3\n"


def test_the_kubernetes_job_gives_every_bundle_to_one_worker(job: dict[str, Any]):
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]

    (line,) = container["args"]
    given = arguments_of(line.replace("$JOB_COMPLETION_INDEX", "5"))
    mount = container["volumeMounts"][0]["mountPath"]

    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert share_of([Path(str(n)) for n in range(8)], given.share) == [Path("5")]
    assert given.share == f"5/{spec['completions']}"
    assert all(path.is_relative_to(mount) for path in [*given.bundles, given.model])
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


def test_workers_are_told_of_less_time_than_they_have_until_they_are_killed(job: dict[str, Any]):
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    told = {entry["name"]: entry["value"] for entry in container["env"]}
    slurm = SLURM.read_text()
    grace = re.search(r"--signal=B:TERM@(\d+)", slurm)
    default = re.search(rf"{STOP_VARIABLE}:-(\d+)", slurm)

    assert grace
    assert default
    assert 60 < float(told[STOP_VARIABLE]) < pod["terminationGracePeriodSeconds"]
    assert 60 < float(default[1]) < float(grace[1])


@pytest.mark.parametrize("readme", [DEPLOY / "README.md"])
def test_the_commands_of_the_readme_are_ours(readme: Path):
    lines = [
        line.partition("#")[0]
        for line in readme.read_text().splitlines()
        if line.startswith("python -m tell_core.bundles")
    ]

    assert [arguments_of(line).command for line in lines] == ["run"]
