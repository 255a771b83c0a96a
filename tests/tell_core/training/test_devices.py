import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tell_core.errors import SpecError, StoreError
from tell_core.training import devices

CPU = torch.device("cpu")


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert devices.resolve_device("auto") == CPU


def test_asking_for_a_gpu_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(SpecError, match="sees no CUDA GPU"):
        devices.resolve_device("cuda")


def test_auto_on_a_cpu_is_float32_without_autocast():
    assert devices.resolve_precision("auto", CPU) == devices.Precision(torch.float32, None)


def test_weights_that_are_trained_stay_in_float32():
    precision = devices.resolve_precision("bfloat16", CPU, "full")

    assert precision == devices.Precision(torch.float32, torch.bfloat16)
    assert precision.name == "bfloat16"


def test_the_gpu_lock_keeps_others_out_and_ends_with_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "gpu.lock"
    monkeypatch.setattr(devices, "_lock_path", lambda _: path)
    code = (
        "import fcntl, os, sys, time\n"
        f"fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with path.open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    holder.kill()
    holder.communicate()

    with devices.exclusive_device(torch.device("cuda", 0)):
        assert path.read_text() == str(os.getpid())


def test_the_lock_names_the_physical_gpu_whatever_its_index_here(monkeypatch: pytest.MonkeyPatch):
    physical = ["GPU-7f", "GPU-2a"]

    def visible(*order: int) -> list[Path]:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties",
            lambda device: SimpleNamespace(uuid=physical[order[device.index]]),
        )  # fmt: skip
        return [devices._lock_path(torch.device("cuda", index)) for index in range(len(order))]

    first, second = visible(0, 1)

    assert first != second
    assert visible(1, 0) == [second, first]
    assert visible(1) == [second]


def refuse_opening(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """As for the file of another user: opening it with any of these flags is not permitted."""
    real_open = os.open

    def guarded(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & refused or refused == os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(devices.os, "open", guarded)


def test_the_gpu_lock_of_another_user_is_held_without_writing_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "gpu.lock"
    path.write_text("4711")
    monkeypatch.setattr(devices, "_lock_path", lambda _: path)
    refuse_opening(monkeypatch, os.O_RDWR | os.O_CREAT)

    with (
        devices.exclusive_device(torch.device("cuda", 0)),
        path.open() as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    assert path.read_text() == "4711"


def test_a_gpu_lock_that_nobody_else_may_read_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "_lock_path", lambda _: tmp_path / "gpu.lock")
    refuse_opening(monkeypatch, os.O_RDONLY)

    with (
        pytest.raises(StoreError, match=r"chmod a\+r"),
        devices.exclusive_device(torch.device("cuda", 0)),
    ):
        pass


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()

    with devices.cpu_threads(before + 1):
        during = torch.get_num_threads()

    assert (during, torch.get_num_threads()) == (before + 1, before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_since_the_last_reset():
    size = 200_000_000
    np.ones(size, dtype=np.int8)
    with_array = devices.peak_memory_bytes(CPU)

    devices.reset_peak_memory(CPU)

    assert devices.peak_memory_bytes(CPU) < with_array - size / 2


def test_peak_memory_without_proc_is_that_of_the_life_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(devices, "_CLEAR_REFS", tmp_path)

    devices.reset_peak_memory(CPU)

    assert devices.peak_memory_bytes(CPU) > 50e6


def test_peak_memory_of_a_process_with_torch_exceeds_fifty_megabytes():
    assert devices.peak_memory_bytes(CPU) > 50e6


def test_a_lack_of_memory_is_known_by_what_torch_says_of_it():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)

    assert devices.is_out_of_memory(caught.value)
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not devices.is_out_of_memory(RuntimeError("shapes do not match"))
