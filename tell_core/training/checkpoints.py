"""Checkpoints: written aside, sealed with digests, verified before they are used.

A checkpoint is a directory ``step-<number>`` with tensors.safetensors, state.json, log.jsonl and
the marker of a finished stage. At most two are kept; when the newest is damaged the one before
serves.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from tell_core.spec.identity import file_digest
from tell_core.store import MARKER, explain_disk_errors, is_intact, read_json, write_json

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
AUTO_SECONDS = 60.0
MOST_SHARE = 0.02
_PARTIAL = ".partial"
_TENSORS, _STATE, _LOG = "tensors.safetensors", "state.json", "log.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on after ``step`` optimiser steps.

    Attributes:
        step: Optimiser steps done.
        identity: Fingerprint of what is trained, on what and how.
        tensors: Weights, optimiser moments, kept weights and probe losses, by name.
        state: Further state, JSON values only.
        log: Text of the log of all steps so far.
    """

    step: int
    identity: str
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    log: str


class CheckpointClock:
    """Says when the next checkpoint of a training is due.

    Attributes:
        step: Optimiser steps done at the last one that this process wrote; 0 before it.
        write_seconds: How long that one took to write; None before it.
    """

    def __init__(self, seconds: float | Literal["auto"]) -> None:
        self.step = 0
        self.write_seconds: float | None = None
        self._wait = AUTO_SECONDS if seconds == "auto" else seconds
        self._is_auto = seconds == "auto"
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to write one."""
        return time.monotonic() - self._last > self._wait

    def can_write_within(self, seconds: float) -> bool:
        """Whether one more can be written in so many seconds, as far as the last one tells."""
        return self.write_seconds is None or self.write_seconds <= seconds

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Time the writing of the one after ``step`` steps, and count from its end to the next."""
        begun = time.monotonic()
        yield
        self._last = time.monotonic()
        self.step, self.write_seconds = step, self._last - begun
        if self._is_auto:
            self._wait = auto_interval(self.write_seconds)


def auto_interval(write_seconds: float) -> float:
    """Seconds from one checkpoint to the next, so that writing is at most `MOST_SHARE` of both."""
    return max(AUTO_SECONDS, write_seconds * (1 / MOST_SHARE - 1))


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under ``directory`` and remove all but the newest two.

    Killed at any moment, it leaves the earlier checkpoints as they were.

    Raises:
        StoreError: The disk is full or not writable.
    """
    final = directory / f"step-{checkpoint.step:08d}"
    partial = directory / _PARTIAL
    with explain_disk_errors(directory):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: value.contiguous() for name, value in checkpoint.tensors.items()}
        save_file(tensors, partial / _TENSORS)
        state = {"step": checkpoint.step, "identity": checkpoint.identity}
        write_json(partial / _STATE, state | {"state": checkpoint.state})
        (partial / _LOG).write_text(checkpoint.log, encoding="utf-8")
        _seal(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(directory)
        for old in _newest_first(directory)[KEPT_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    directory: Path, identity: str, find_misfit: Callable[[Checkpoint], str | None] | None = None
) -> Checkpoint | None:
    """The newest intact checkpoint of this very training, or None.

    Those that cannot be used are removed, with a warning: damaged ones, those of another training,
    and those of another version of this program, which it could not go on from exactly.

    Args:
        directory: Where the checkpoints of a training lie.
        identity: Of the training.
        find_misfit: What of a checkpoint's content this version does not know or misses; None when
            it can go on from it.
    """
    for path in _newest_first(directory):
        found = _usable(path, identity, find_misfit)
        if isinstance(found, Checkpoint):
            return found
        logger.warning(
            "checkpoint %s %s; removed: an earlier one serves, or the training begins anew",
            path,
            found,
        )
        shutil.rmtree(path)
    return None


def _usable(
    path: Path, identity: str, find_misfit: Callable[[Checkpoint], str | None] | None
) -> Checkpoint | str:
    """The checkpoint, or in words why it cannot be used."""
    if not is_intact(path):
        return "is damaged"
    checkpoint = _read(path)
    if checkpoint is None:
        return "was written by another version of this program (its files are others)"
    if checkpoint.identity != identity:
        return (
            f"belongs to another training ({checkpoint.identity}, this one is {identity}): its"
            " data, model, seed or settings differ"
        )
    misfit = find_misfit(checkpoint) if find_misfit else None
    if misfit:
        return f"was written by another version of this program ({misfit})"
    return checkpoint


def _read(path: Path) -> Checkpoint | None:
    """An intact checkpoint; None when it has not the parts that `save_checkpoint` writes."""
    if not all((path / name).is_file() for name in (_TENSORS, _STATE, _LOG)):
        return None
    saved = read_json(path / _STATE)
    if not isinstance(saved, dict) or not {"step", "identity", "state"} <= set(saved):
        return None
    log = (path / _LOG).read_text(encoding="utf-8")
    tensors = load_file(path / _TENSORS)
    return Checkpoint(saved["step"], saved["identity"], tensors, saved["state"], log)


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints, after the training has succeeded."""
    shutil.rmtree(directory, ignore_errors=True)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _seal(directory: Path) -> None:
    """Sync every file to disk, then write the marker with sizes and digests."""
    records = {}
    for path in _files(directory):
        _sync(path)
        records[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    write_json(directory / MARKER, {"files": records})
    _sync(directory)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.iterdir()) if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
