"""Ranks: helper processes that compute shares of every step's gradient.

The process that trains is rank 0. It starts the helpers, tells them the step, adds up gradients,
moves the weights and hands them round; so helpers need neither optimiser nor checkpoint, all ranks
have the same weights by construction, and whoever runs a training starts and ends nothing but it.
On GPUs every rank has one of its own (NCCL), on CPUs they talk through Gloo.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tell_core.data.encoding import IntArray
from tell_core.errors import SpecError, TrainingError
from tell_core.training import devices
from tell_core.training.batching import share_rows
from tell_core.training.gradients import StepLosses

if TYPE_CHECKING:
    from tell_core.spec.model import TrainingSpec
    from tell_core.training.trainer import StepEngine, Trainer

_STOP = -1
# Longer than any probe or checkpoint between two steps takes.
_PATIENCE = timedelta(hours=1)
_END_SECONDS = 5.0
_SHOWN_ERROR = 2000


def check_ranks(training: TrainingSpec, device: torch.device) -> None:
    """Refuse more ranks than a step has examples, or than there are GPUs.

    Raises:
        SpecError: As said.
    """
    if training.num_ranks > training.batch_size:
        raise SpecError(
            f"training.num_ranks is {training.num_ranks}, but a step has only"
            f" {training.batch_size} examples to share among them; lower num_ranks or raise"
            " training.batch_size"
        )
    if device.type == "cuda" and training.num_ranks > torch.cuda.device_count():
        raise SpecError(
            f"training.num_ranks is {training.num_ranks}, but {torch.cuda.device_count()} GPUs are"
            " visible, and every rank needs one of its own; lower num_ranks"
        )


class Ranks:
    """All ranks of a training, as seen from one of them.

    Attributes:
        rank: Which one this is; 0 trains, the others help.
        num_ranks: How many there are.
        parameters: The trained parameters of this rank's model, by name.
        device: Where this rank computes.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.parameters = parameters
        self.device = device

    def announce(self, step: int, seed: int = 0) -> tuple[int, int]:
        """Rank 0 says which step comes next and its seed; the others hear it."""
        message = torch.tensor([step, seed], dtype=torch.int64, device=self.device)
        dist.broadcast(message, 0)
        return int(message[0]), int(message[1])

    def hand_round(self) -> None:
        """Give every rank the weights of rank 0."""
        for weight in self.parameters.values():
            dist.broadcast(weight.data, 0)

    def share(self, lengths: IntArray) -> IntArray:
        """Which examples of a step, by their lengths (B,), this rank computes."""
        return share_rows(lengths, self.num_ranks)[self.rank]

    def add_up(self, losses: StepLosses, rows: IntArray) -> None:
        """Make gradients and sums of rank 0 those of the whole step.

        Args:
            losses: Sums over this rank's share; on rank 0 over the step afterwards.
            rows: Shape (B,). Examples of the step.
        """
        for weight in self.parameters.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.reduce(weight.grad, 0)
        by_row = np.zeros(len(rows))
        for own, sums in losses.by_row:
            for row, value in zip(own.tolist(), sums.tolist(), strict=True):
                # Equal rows of one step have equal losses: the first place will do for both.
                by_row[np.flatnonzero(rows == row)[0]] += value
        counts = (losses.num_tokens, losses.num_padded_tokens, losses.num_forward_passes)
        step = torch.tensor(
            [losses.total, losses.task, *counts, *by_row], dtype=torch.float64, device=self.device
        )
        dist.reduce(step, 0)
        total, task, *rest = step.tolist()
        losses.total, losses.task = total, task
        losses.num_tokens, losses.num_padded_tokens, losses.num_forward_passes = map(int, rest[:3])
        losses.by_row = [(rows, np.asarray(rest[3:]))]


@contextmanager
def open_ranks(arguments: Mapping[str, Any], trainer: Trainer, num_ranks: int) -> Iterator[None]:
    """Start the helpers of ``trainer`` and have them while the block runs.

    Args:
        arguments: What `helper_arguments` gave.
        trainer: That of rank 0.
        num_ranks: Processes in all, rank 0 included; with 1 there is nothing to start.

    Raises:
        TrainingError: A helper ended before its time.
    """
    if num_ranks == 1:
        yield
        return
    with tempfile.TemporaryDirectory() as directory, ExitStack() as cleanup:
        helpers = [
            _start_helper(Path(directory), rank, num_ranks, arguments)
            for rank in range(1, num_ranks)
        ]
        cleanup.callback(_kill, helpers)
        try:
            _join(Path(directory), 0, num_ranks, trainer.device, helpers)
            trainer.ranks = Ranks(0, num_ranks, trainer.parameters, trainer.device)
            yield
            trainer.ranks.announce(_STOP)
            _wait(helpers)
        except RuntimeError as error:
            if devices.is_out_of_memory(error):
                raise
            raise _helper_error(Path(directory), helpers, error) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _start_helper(
    directory: Path, rank: int, num_ranks: int, arguments: Mapping[str, Any]
) -> subprocess.Popen[bytes]:
    settings = {"rank": rank, "num_ranks": num_ranks, "parent": os.getpid(), **arguments}
    command = [sys.executable, "-m", __name__, str(directory), json.dumps(settings)]
    with _errors_of(directory, rank).open("wb") as errors:
        return subprocess.Popen(command, stdout=errors, stderr=errors, stdin=subprocess.DEVNULL)


def _errors_of(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.log"


def _join(
    directory: Path,
    rank: int,
    num_ranks: int,
    device: torch.device,
    helpers: list[subprocess.Popen[bytes]] | None = None,
) -> None:
    """Enter the process group; its members find one another through a file.

    Raises:
        RuntimeError: A helper ended while rank 0 waited for it.
    """
    ready = directory / f"ready-{rank}"
    ready.touch()
    others = [directory / f"ready-{other}" for other in range(num_ranks)]
    while not all(path.exists() for path in others):
        if helpers and any(helper.poll() is not None for helper in helpers):
            raise RuntimeError("a helper did not start")
        time.sleep(0.05)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{directory / 'meeting'}",
        rank=rank,
        world_size=num_ranks,
        timeout=_PATIENCE,
    )


def _helper_error(
    directory: Path, helpers: list[subprocess.Popen[bytes]], error: Exception
) -> Exception:
    """What a helper said when it ended; ``error`` itself when all of them run."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        for rank, helper in enumerate(helpers, start=1):
            if helper.poll() is not None:
                said = _errors_of(directory, rank).read_text(errors="replace").strip()
                return TrainingError(
                    f"rank {rank} of the training ended with code {helper.returncode}; the same"
                    f" command goes on from the last checkpoint. It said: {said[-_SHOWN_ERROR:]}"
                )
        time.sleep(0.1)
    return error


def _wait(helpers: list[subprocess.Popen[bytes]]) -> None:
    """Give helpers that were told to stop the time to do so."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline and any(helper.poll() is None for helper in helpers):
        time.sleep(0.05)


def _kill(helpers: list[subprocess.Popen[bytes]]) -> None:
    """End the helpers that still run: they hold nothing that is not on rank 0."""
    for helper in helpers:
        helper.kill()
        helper.wait()


def helper_arguments(
    *, model_path: str, revision: str | None, inputs: Path, training: TrainingSpec, dtype: str
) -> dict[str, Any]:
    """What a helper is told, as JSON values."""
    return {
        "model_path": model_path,
        "revision": revision,
        "inputs": str(inputs),
        "training": training.model_dump(mode="json"),
        "dtype": dtype,
    }


def main() -> None:
    """A helper: ``python -m tell_core.training.ranks DIRECTORY SETTINGS``."""
    directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 writes its checkpoint, then ends us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(settings["parent"],), daemon=True).start()
    _help(directory, settings)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _help(directory: Path, settings: dict[str, Any]) -> None:
    """Compute this rank's share of each announced step until told to stop."""
    from tell_core.training.loop import load_base, read_inputs, trainable
    from tell_core.training.trainer import StepEngine

    rank = settings["rank"]
    training = cast("TrainingSpec", SimpleNamespace(**settings["training"]))
    device = devices.resolve_device(training.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
    with devices.exclusive_device(device), devices.cpu_threads(training.threads):
        precision = devices.resolve_precision(settings["dtype"], device, training.method)
        base = load_base(
            settings["model_path"], settings["revision"], training, settings["dtype"], device
        )
        mixture, _ = read_inputs(Path(settings["inputs"]), base.model)
        with trainable(base.model, training, 0, device, is_shared=False) as model:
            engine = StepEngine(model, mixture, training, device, precision)
            _join(directory, rank, settings["num_ranks"], device)
            ranks = Ranks(rank, settings["num_ranks"], engine.parameters, device)
            with engine.attended():
                _follow(ranks, engine)
    dist.destroy_process_group()


def _follow(ranks: Ranks, engine: StepEngine) -> None:
    while True:
        step, seed = ranks.announce(0)
        if step == _STOP:
            return
        ranks.hand_round()
        engine.gradients(step, seed, ranks)


if __name__ == "__main__":
    main()
