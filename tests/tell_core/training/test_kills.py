"""Trainings killed at random steps of each epoch and within the writing of a checkpoint."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tell_core.spec.model import TrainingSpec
from tell_core.training.loop import train_cell
from tests.tell_core.training.test_loop import outcome

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH, NUM_EPOCHS = 6, 4
# Moments of writing a checkpoint, in their order: what is about to be done when the kill comes.
MOMENTS = ("save_file", "write_json", "_seal", "_sync", "_newest_first")

# Forks before torch has computed anything, so that each child trains as a fresh process would.
KILLED = """
import os, pathlib, signal, sys
from tell_core.spec.model import TrainingSpec
from tell_core.training import checkpoints
from tell_core.training.loop import train_cell

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def train_until(step, moment):
    def watch(done, *_):
        if done == step:
            setattr(checkpoints, moment, kill) if moment else kill()

    train_cell(model_path=model, revision=None, inputs=pathlib.Path(inputs), seed=3,
               training=TrainingSpec.model_validate_json(spec), out=pathlib.Path(out),
               on_progress=watch)

model, inputs, spec, out, *kills = sys.argv[1:]
for planned in kills:
    step, _, moment = planned.partition(":")
    child = os.fork()
    if child == 0:
        train_until(int(step), moment)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def random_kills(seed: int) -> list[str]:
    """A step of the first, a middle and the last epoch, each at once or within its checkpoint."""
    generator = np.random.default_rng(seed)
    kills = []
    for epoch in (0, int(generator.integers(1, NUM_EPOCHS - 1)), NUM_EPOCHS - 1):
        first, last = sorted(generator.choice(STEPS_PER_EPOCH - 1, 2, replace=False) + 1)
        start = epoch * STEPS_PER_EPOCH
        kills += [f"{start + first}:", f"{start + last}:{generator.choice(MOMENTS)}"]
    return kills


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_in_every_part_of_a_training_it_ends_with_the_same_bits(
    model_directory: Path,
    training_spec: Callable[..., TrainingSpec],
    write_inputs: Callable[..., Path],
    tmp_path: Path,
    method: str,
    seed: int,
):
    inputs, kills = write_inputs(epochs=NUM_EPOCHS), random_kills(seed)
    spec = training_spec(
        method=method, lora_dropout=0.2, keep="best_dev", checkpoint_seconds=1e-9, epochs=NUM_EPOCHS
    )
    paths: dict[str, Any] = {"model_path": str(model_directory), "revision": None}
    paths |= {"inputs": inputs, "training": spec, "seed": 3}
    train_cell(**paths, out=tmp_path / "unbroken")

    arguments = [model_directory, inputs, spec.model_dump_json(), tmp_path / "killed", *kills]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == [b"9"] * len(kills), (kills, done.stderr.decode())
    train_cell(**paths, out=tmp_path / "killed")

    assert outcome(tmp_path / "killed") == outcome(tmp_path / "unbroken"), kills


def test_when_the_kill_damaged_the_newest_checkpoint_the_one_before_serves(
    model_directory: Path,
    training_spec: Callable[..., TrainingSpec],
    write_inputs: Callable[..., Path],
    tmp_path: Path,
):
    """As after a power cut: the directory has its name, its content is not all on the disk."""
    inputs = write_inputs(epochs=NUM_EPOCHS)
    spec = training_spec(keep="best_dev", checkpoint_seconds=1e-9, epochs=NUM_EPOCHS)
    paths: dict[str, Any] = {"model_path": str(model_directory), "revision": None}
    paths |= {"inputs": inputs, "training": spec, "seed": 3}
    train_cell(**paths, out=tmp_path / "unbroken")
    arguments = [model_directory, inputs, spec.model_dump_json(), tmp_path / "killed", "13:"]
    subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], check=True)
    checkpoints = sorted((tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000011", "step-00000012"]
    with (checkpoints[-1] / "tensors.safetensors").open("r+b") as file:
        file.truncate(100)
    resumed: list[int] = []

    train_cell(**paths, out=tmp_path / "killed", on_progress=lambda done, *_: resumed.append(done))

    assert resumed[0] == 12
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "unbroken")
