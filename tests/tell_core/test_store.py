import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
