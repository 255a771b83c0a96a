"""Answers are kept batch by batch: a kill costs one of them, and never mixes two questions."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tell_core.answer_log import log_path, open_answers
from tell_core.errors import StoreError

BATCHES = st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=3), max_size=5)


class StoppedError(Exception):
    """The end of an attempt that did not come to its end."""


def keep(out: Path, asked: str, batches) -> None:
    """An attempt that stops after these batches."""
    with pytest.raises(StoppedError), open_answers(out, asked) as log:
        for batch in batches:
            log.add(batch)
        raise StoppedError


def kept(out: Path, asked: str) -> list[str]:
    """What a new attempt finds; it stops too."""
    found: list[str] = []
    with pytest.raises(StoppedError), open_answers(out, asked) as log:
        found = log.answers
        raise StoppedError
    return found


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BATCHES, st.data())
def test_however_much_of_the_file_is_left_whole_batches_are_found(tmp_path_factory, batches, data):
    out = tmp_path_factory.mktemp("answers") / "out.jsonl"
    keep(out, "asked", batches)
    content = log_path(out).read_bytes()
    num_left = data.draw(st.integers(0, len(content)))

    log_path(out).write_bytes(content[:num_left])

    num_whole = max(content[:num_left].count(b"\n") - 1, 0)
    assert kept(out, "asked") == [answer for batch in batches[:num_whole] for answer in batch]


def test_a_second_attempt_goes_on_behind_a_batch_that_was_cut(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    keep(out, "asked", [["a", "b"]])
    with log_path(out).open("a") as file:
        file.write('["c", "')

    keep(out, "asked", [["d"]])

    assert kept(out, "asked") == ["a", "b", "d"]


def test_answers_to_another_question_are_not_used(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    keep(out, "asked", [["a"]])

    assert kept(out, "asked another") == []
    assert kept(out, "asked") == []


def test_nothing_is_left_beside_a_table_that_was_written(tmp_path: Path):
    with open_answers(tmp_path / "out.jsonl", "asked") as log:
        log.add(["a"])

    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_table(tmp_path: Path):
    out = tmp_path / "out.jsonl"

    with (
        open_answers(out, "asked"),
        pytest.raises(StoreError, match="another process"),
        open_answers(out, "asked"),
    ):
        pass


def test_a_kill_costs_no_batch_that_was_answered(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    work = (
        "import os, sys, signal; from pathlib import Path\n"
        "from tell_core.answer_log import open_answers\n"
        "with open_answers(Path(sys.argv[1]), 'asked') as log:\n"
        "    log.add(['a', 'b']); os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    done = subprocess.run([sys.executable, "-c", work, str(out)], env=os.environ, check=False)

    assert done.returncode == -signal.SIGKILL
    assert kept(out, "asked") == ["a", "b"]
