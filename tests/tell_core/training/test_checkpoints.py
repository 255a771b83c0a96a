import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.store import MARKER, write_json
from tell_core.training import checkpoints
from tell_core.training.checkpoints import (
    Checkpoint,
    CheckpointClock,
    _seal,
    auto_interval,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)


def checkpoint(step: int, identity: str = "same") -> Checkpoint:
    tensors = {"weight/a": torch.full((3, 2), float(step)), "probes": torch.zeros(0, 5)}
    return Checkpoint(step, identity, tensors, {"train_seconds": 1.5}, f"line {step}\n")


def test_a_checkpoint_is_read_back_whole(tmp_path: Path):
    save_checkpoint(tmp_path, checkpoint(7))

    read = load_checkpoint(tmp_path, "same")

    assert read is not None
    assert torch.equal(read.tensors["weight/a"], torch.full((3, 2), 7.0))
    assert (read.step, read.state, read.log) == (7, {"train_seconds": 1.5}, "line 7\n")


def test_at_most_two_checkpoints_are_kept(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, checkpoint(step))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "log.jsonl", "_SUCCESS"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_when_the_newest_is_damaged_the_one_before_serves(tmp_path: Path, name: str, damage: str):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1] if name != "_SUCCESS" else content[:9])
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])

    read = load_checkpoint(tmp_path, "same")

    assert read is not None
    assert read.step == 1


def test_a_checkpoint_of_another_training_is_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save_checkpoint(tmp_path, checkpoint(9, "theirs"))

    with caplog.at_level(logging.WARNING):
        read = load_checkpoint(tmp_path, "ours")

    assert read is None
    assert "theirs" in caplog.text
    assert "ours" in caplog.text


def test_a_refused_checkpoint_does_not_push_out_ours(tmp_path: Path):
    save_checkpoint(tmp_path, checkpoint(8, "theirs"))
    save_checkpoint(tmp_path, checkpoint(9, "theirs"))
    load_checkpoint(tmp_path, "ours")

    save_checkpoint(tmp_path, checkpoint(1, "ours"))

    read = load_checkpoint(tmp_path, "ours")
    assert read is not None
    assert read.step == 1


def test_a_checkpoint_that_this_version_cannot_go_on_from_gives_way_to_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))

    read = load_checkpoint(
        tmp_path, "same", lambda found: "'x' is new" if found.step == 2 else None
    )

    assert read is not None
    assert read.step == 1
    assert "step-00000002 was written by another version of this program ('x' is new)" in (
        caplog.text
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("other", ["weights.safetensors", "state.json"])
def test_an_intact_checkpoint_with_other_files_is_of_another_version(
    tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture
):
    save_checkpoint(tmp_path, checkpoint(3))
    path = tmp_path / "step-00000003"
    if other == "state.json":
        write_json(path / other, {"number": 3})
    else:
        (path / "tensors.safetensors").rename(path / other)
    (path / MARKER).unlink()
    _seal(path)

    assert load_checkpoint(tmp_path, "same") is None
    assert "another version of this program (its files are others)" in caplog.text


@given(seconds=st.floats(0, 1e4))
def test_writing_by_itself_takes_at_most_two_percent_of_the_time(seconds: float):
    interval = auto_interval(seconds)

    assert interval >= 60
    assert seconds / (interval + seconds) <= 0.02 + 1e-12


def test_a_wished_interval_is_kept_however_long_writing_takes(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    clocks = {seconds: CheckpointClock(seconds) for seconds in (5.0, "auto")}

    for clock in clocks.values():
        with clock.writing(1):
            now[0] += 2.0
    due = {}
    for passed in (4.0, 2.0, 90.0, 3.0):
        now[0] += passed
        due[now[0]] = [clock.is_due() for clock in clocks.values()]

    assert due == {
        8.0: [True, False],
        10.0: [True, False],
        100.0: [True, False],
        103.0: [True, True],
    }


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path):
    save_checkpoint(tmp_path, checkpoint(3))
    (tmp_path / "step-00000003").rename(tmp_path / ".partial")

    assert load_checkpoint(tmp_path, "same") is None


def test_removing_checkpoints_twice_does_no_harm(tmp_path: Path):
    save_checkpoint(tmp_path / "checkpoints", checkpoint(3))

    remove_checkpoints(tmp_path / "checkpoints")
    remove_checkpoints(tmp_path / "checkpoints")

    assert not (tmp_path / "checkpoints").exists()
