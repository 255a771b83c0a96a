"""The clock jumps, by an hour or a year, forward and back: no result and no stage depends on it."""

import itertools
import time
from pathlib import Path

import pytest

from tests.faults.whole_run import differences, outputs, run_whole

_HOUR = 3600.0
_YEAR = 365 * 24 * _HOUR


def test_a_clock_that_jumps_changes_nothing(
    drill_spec: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    true_time, jumps = time.time, itertools.cycle([0.0, _HOUR, -_HOUR, _YEAR, -_YEAR])
    monkeypatch.setattr(time, "time", lambda: true_time() + next(jumps))

    run_whole(drill_spec, tmp_path / "tiny")
    run_whole(drill_spec, tmp_path / "tiny")

    monkeypatch.undo()
    assert differences(outputs(tmp_path / "tiny"), outputs(unbroken)) == []
