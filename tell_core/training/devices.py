"""Devices: which one, in which number format, for whom, and how much memory it took."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tell_core.errors import SpecError, StoreError

logger = logging.getLogger(__name__)

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16"]

# Linux, proc(5): writing 5 sets VmHWM, the largest resident set, to the present one.
_CLEAR_REFS, _RESET_HIGH_WATER_MARK = Path("/proc/self/clear_refs"), "5"
_STATUS = Path("/proc/self/status")
# What torch 2.13 says in a plain RuntimeError: its allocator for CPUs, and cuBLAS of its workspace.
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED")


def resolve_device(name: DeviceName = "auto") -> torch.device:
    """The device to compute on; auto takes the first visible GPU when there is one.

    A lane sees those of its own only.

    Raises:
        SpecError: A GPU was asked for and none is visible.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            f"device: cuda was asked for, but torch {torch.__version__} sees no CUDA GPU here; "
            "use device: cpu or auto, or install a CUDA build of torch"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


@dataclass(frozen=True)
class Precision:
    """Number formats of one training.

    Attributes:
        weights: Format of the base weights in memory. Trained weights are always float32.
        compute: Format of matrix products under autocast, or None for that of the weights.
    """

    weights: torch.dtype
    compute: torch.dtype | None

    @property
    def name(self) -> str:
        """Name of the format in which matrix products are computed, such as ``bfloat16``."""
        return str(self.compute or self.weights).removeprefix("torch.")

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Context in which the forward pass runs."""
        if self.compute is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def resolve_precision(
    dtype: DtypeName, device: torch.device, method: Literal["lora", "full"] = "lora"
) -> Precision:
    """Number formats for a device; auto means bfloat16 on a GPU that has it, else float32.

    TF32 stays off (PyTorch's default), so float32 on a GPU means float32. With bfloat16, frozen
    base weights are kept in bfloat16 and everything that is trained in float32.

    Args:
        dtype: As in the model specification.
        device: Where it will run.
        method: ``lora`` freezes the base weights, ``full`` trains them.
    """
    if dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    if dtype == "float32":
        return Precision(torch.float32, None)
    return Precision(torch.float32 if method == "full" else torch.bfloat16, torch.bfloat16)


@contextmanager
def exclusive_device(device: torch.device) -> Iterator[None]:
    """Hold a GPU against other processes of this machine; waits for whoever holds it.

    The lock is an OS file lock: it dies with its process, however that ends. A CPU is never
    locked. Not re-entrant.
    """
    if device.type != "cuda":
        yield
        return
    descriptor, is_ours = _open_lock(_lock_path(device))
    try:
        _wait_for_lock(descriptor, device)
        if is_ours:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock_path(device: torch.device) -> Path:
    """Lock file of a physical GPU; by its UUID, for indices change with visibility."""
    uuid = torch.cuda.get_device_properties(device).uuid
    return Path(tempfile.gettempdir()) / f"tell-gpu-{uuid}.lock"


def _open_lock(path: Path) -> tuple[int, bool]:
    """Descriptor of the lock file, and whether the holder's process id may be written into it.

    The file of another user can be locked without a right to write.

    Raises:
        StoreError: It is another user's, who lets nobody read it.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
    except PermissionError:
        pass
    try:
        return os.open(path, os.O_RDONLY), False
    except PermissionError as error:
        raise StoreError(
            f"the lock of the GPU, {path}, belongs to another user who lets nobody read it: ask"
            f" them for `chmod a+r {path}`"
        ) from error


def _wait_for_lock(descriptor: int, device: torch.device) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        logger.info("waiting for GPU %s, held by process %s", device, holder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; only a GPU's own allocator has a type for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring peak memory anew, from what is in use now.

    Without Linux's /proc a CPU's peak cannot be reset and stays that of the process's life.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes since the last `reset_peak_memory`.

    On a GPU: of the tensors that this process held there. On a CPU: the largest resident set of
    the whole process, so interpreter, libraries (a few 100 MB) and memory that earlier work has
    not given back are in it: peaks compare within one machine, not as the needs of a model.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(resident) * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` CPU threads, then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
