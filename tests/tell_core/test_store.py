import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tell_core.errors import StoreError
from tell_core.store import (
    MARKER,
    explain_disk_errors,
    find_stage,
    read_json,
    stage_path,
    write_json,
    write_stage,
)


def finish(root: Path, content: bytes = b"data") -> Path:
    with write_stage(root, "train", "f" * 16) as out:
        (out / "deep").mkdir()
        (out / "deep" / "file").write_bytes(content)
    return stage_path(root, "train", "f" * 16)


def test_a_finished_stage_is_found(tmp_path: Path):
    assert finish(tmp_path) == find_stage(tmp_path, "train", "f" * 16)


def test_a_stage_that_failed_is_not_found(tmp_path: Path):
    with pytest.raises(RuntimeError), write_stage(tmp_path, "train", "f" * 16) as out:
        (out / "file").write_text("half")
        raise RuntimeError

    assert find_stage(tmp_path, "train", "f" * 16) is None


@given(content=st.binary(min_size=1, max_size=64), data=st.data())
def test_any_flipped_bit_is_noticed(tmp_path_factory, content: bytes, data):
    root = tmp_path_factory.mktemp("store")
    file = finish(root, content) / "deep" / "file"
    position = data.draw(st.integers(0, len(content) - 1))
    bit = 1 << data.draw(st.integers(0, 7))

    damaged = bytearray(content)
    damaged[position] ^= bit
    file.write_bytes(damaged)

    assert find_stage(root, "train", "f" * 16) is None


@pytest.mark.parametrize("victim", [MARKER, "deep/file"])
def test_a_missing_file_is_noticed(tmp_path: Path, victim: str):
    (finish(tmp_path) / victim).unlink()

    assert find_stage(tmp_path, "train", "f" * 16) is None


def test_a_damaged_stage_is_written_anew(tmp_path: Path):
    (finish(tmp_path) / "deep" / "file").write_bytes(b"rot")

    finish(tmp_path)

    assert find_stage(tmp_path, "train", "f" * 16) is not None


def test_resume_keeps_what_an_interrupted_attempt_left(tmp_path: Path):
    for resume, left in ((True, "kept"), (False, None)):
        with pytest.raises(RuntimeError), write_stage(tmp_path, "s", "a", resume=True) as out:
            (out / "checkpoint").write_text("kept")
            raise RuntimeError

        with write_stage(tmp_path, "s", "a", resume=resume) as out:
            found = (out / "checkpoint").read_text() if (out / "checkpoint").exists() else None
            assert found == left


def test_a_full_disk_is_explained(tmp_path: Path):
    with pytest.raises(StoreError, match="free some space"), explain_disk_errors(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"))


FULL_DISK = """
import pathlib, resource, signal, sys
import numpy as np
from safetensors.numpy import save_file
from tell_core.errors import StoreError
from tell_core.store import write_stage

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
root = pathlib.Path(sys.argv[1])
array = np.zeros(10_000)
for stage, write in [
    ("safetensors", lambda out: save_file({"array": array}, out / "file")),
    ("numpy", lambda out: np.savez(out / "file", array)),
    ("plain", lambda out: (out / "file").write_bytes(array.tobytes())),
]:
    try:
        with write_stage(root, stage, "f") as out:
            write(out)
    except StoreError as error:
        print(error)
"""


def test_a_file_that_cannot_grow_is_explained_whoever_writes_it(tmp_path: Path):
    """The limit on file sizes stands in for a full disk: it needs no disk of its own."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    messages = done.stdout.splitlines()
    assert len(messages) == 3, done.stdout + done.stderr
    assert all("File too large" in message for message in messages)
    assert str(tmp_path / "stages" / "safetensors-f.partial") in messages[0]


@given(number=st.sampled_from([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES]))
def test_disk_errors_of_safetensors_are_explained(number: int):
    text = f"Error while serializing: I/O error: what (os error {number})"
    with pytest.raises(StoreError, match=os.strerror(number)), explain_disk_errors(Path("x")):
        raise SafetensorError(text)


@pytest.mark.parametrize("text", ["invalid header", "I/O error: no such file (os error 2)"])
def test_other_errors_of_safetensors_are_left_as_they_are(text: str):
    with pytest.raises(SafetensorError, match=text[:9]), explain_disk_errors(Path("x")):
        raise SafetensorError(text)


def test_json_is_replaced_in_one_step_and_never_holds_nan(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": 1})

    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})

    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_unreadable_json_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")

    with pytest.raises(StoreError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
