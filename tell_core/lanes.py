"""Lanes: worker processes in which cells are trained and evaluated, one at a time each.

A lane keeps its libraries loaded, so a small cell costs no start-up. Each lane leads a process
group of its own and, where there are GPUs, sees those of its own only. It ends with the process
that opened it, also when that one is killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from tell_core.errors import TrainingError
from tell_core.training.stopping import STOP_VARIABLE, stop_seconds

if TYPE_CHECKING:
    from tell_core.spec.model import TrainingSpec

T = TypeVar("T")

# How long a lane may take to write a checkpoint after it was asked to stop, in seconds, unless
# `STOP_VARIABLE` says otherwise: whoever cancels a run waits no longer than 10 s for its end. Where
# the last checkpoint took longer, none is begun.
STOP_SECONDS = 8.0
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.5


class _Lanes:
    """The open worker processes.

    Attributes:
        pool: Hands work to them.
        groups: Process ids of the lanes that have started, each also the id of its group.
        ending: Set when they are asked to end; a lane that only starts then ends by itself.
    """

    def __init__(self, count: int, gpus: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.groups = context.SimpleQueue()
        self.ending = context.Event()
        self.stop_seconds = stop_seconds(STOP_SECONDS)
        free_gpus = context.SimpleQueue()
        for own in gpus:
            free_gpus.put(own)
        self.pool = ProcessPoolExecutor(
            count,
            mp_context=context,
            initializer=_enter_lane,
            initargs=(self.groups, self.ending, self.stop_seconds, free_gpus if gpus else None),
        )

    @property
    def is_stopped(self) -> bool:
        """Whether they were asked to end; nothing may be handed to them any more."""
        return self.ending.is_set()


_lanes: _Lanes | None = None


class ProgressFile:
    """A progress callback that leaves its last state in a file, for a watcher to read.

    Written at most twice a second, so that it costs nothing beside an optimiser step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` units of ``phase`` are finished."""
        if time.monotonic() - self._last < _POLL_SECONDS and done < total:
            return
        self._last = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([phase, done, total]))

    def read(self) -> tuple[str, int, int] | None:
        """The last state, or None when nothing was noted yet."""
        try:
            phase, done, total = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return str(phase), int(done), int(total)


@contextmanager
def open_lanes(count: int, gpus: Sequence[str] = ()) -> Iterator[None]:
    """Have ``count`` worker processes while the block runs; none of them outlives it.

    Args:
        count: How many.
        gpus: What `gpus_of_lanes` gave, one for each of them; none: all see what is seen here.
    """
    global _lanes
    opened = _lanes = _Lanes(count, gpus)
    try:
        yield
    except BaseException:
        stop_lanes()
        raise
    finally:
        opened.pool.shutdown(wait=True, cancel_futures=True)
        _lanes = None


def stop_lanes() -> None:
    """End the open lanes: ask them for a checkpoint, wait for it, then kill what is left.

    Whoever waits in `in_lane` gets an error at once, so this must come before threads are joined.
    """
    if _lanes is None or _lanes.is_stopped:
        return
    _lanes.ending.set()
    _stop(_lanes.groups, _lanes.stop_seconds)


def in_lane(
    work: Callable[..., T],
    *arguments: Any,
    watch: Callable[[], None] | None = None,
) -> T:
    """Run ``work(*arguments)`` in a free lane and wait for it; without lanes, run it here.

    Args:
        work: A function that can be imported by name.
        arguments: Its arguments; they travel to another process.
        watch: Called about twice a second while waiting.

    Raises:
        TrainingError: The lanes were stopped, or one was ended from outside, for instance for
            lack of memory.
    """
    if _lanes is None:
        return work(*arguments)
    try:
        if _lanes.is_stopped:
            raise BrokenProcessPool
        future = _lanes.pool.submit(work, *arguments)
        while True:
            try:
                return future.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise
                if watch:
                    watch()
    except BrokenProcessPool as error:
        if _lanes is None or _lanes.is_stopped:
            raise TrainingError("stopped; the same command goes on from here") from error
        raise TrainingError(
            "a worker process was ended from outside, most often for lack of memory. What was"
            " finished is kept: run the same command again to continue; a smaller"
            " `training.micro_batch_size` or more `training.threads` (fewer processes side by"
            " side) need less memory."
        ) from error


def num_lanes(training: TrainingSpec) -> int:
    """Trainings side by side: as many as have GPUs of their own, or CPUs for their threads."""
    if gpus := gpus_of_lanes(training):
        return len(gpus)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (usable or 1) // (training.threads * training.num_ranks))


def gpus_of_lanes(training: TrainingSpec) -> list[str]:
    """Which GPUs each lane sees, as values of `VISIBLE_GPUS`; empty where none is to be used.

    A lane has as many as a training has ranks. Where there are fewer, one lane sees them all, and
    its training is refused.
    """
    import torch

    if training.device == "cpu" or not torch.cuda.is_available():
        return []
    count, size = torch.cuda.device_count(), training.num_ranks
    # CUDA counts within what is named there, by number or by identifier.
    named = os.environ.get(VISIBLE_GPUS, "").split(",")[:count]
    visible = named if named != [""] else [str(index) for index in range(count)]
    starts = range(0, max(count - size, 0) + 1, size)
    return [",".join(visible[start : start + size]) for start in starts]


def _enter_lane(members: Any, ending: Any, seconds: float, free_gpus: Any) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[STOP_VARIABLE] = str(seconds)
    if free_gpus is not None:  # read when CUDA is initialised, which nothing has done here yet
        os.environ[VISIBLE_GPUS] = free_gpus.get()
    members.put(os.getpid())
    # Whoever stops the lanes sets this before looking who is there: one of the two sees the other.
    if ending.is_set():
        os._exit(1)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.killpg(0, signal.SIGKILL)


def _stop(members: Any, seconds: float) -> None:
    groups = []
    while not members.empty():
        groups.append(members.get())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(_runs(group) for group in groups):
        # A training that was asked writes its checkpoint, and its lane then waits for more work:
        # asked again, it ends.
        _signal(groups, signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
    _signal(groups, signal.SIGKILL)


def _signal(groups: list[int], number: int) -> None:
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, number)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
