import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.telling import telling


class _Engine:
    """A data engine whose statement at work is done by as many percent as it is told."""

    percent = -1.0

    def query_progress(self):
        return self.percent


def _told(engine, *calls, until=0, every_seconds=60.0):
    """What is passed on of ``calls``, and of what follows until so many were told."""
    found = []
    with telling(engine, lambda *call: found.append(call), every_seconds) as report:
        for call in calls:
            report(*call)
        end = time.monotonic() + 5
        while len(found) < until and time.monotonic() < end:
            time.sleep(0.005)
    return found


@given(total=st.integers(100, 10**9), share=st.floats(0, 1))
def test_steps_of_many_units_are_passed_on_as_they_are(total, share):
    call = ("encode", int(share * total), total)

    assert _told(_Engine(), call) == [call]


@given(total=st.integers(0, 99), data=st.data())
def test_steps_of_few_units_are_told_in_percent(total, data):
    done = data.draw(st.integers(0, total))

    [(step, percent, whole)] = _told(_Engine(), ("write", done, total))

    assert (step, whole) == ("write", 100)
    assert percent == (100 * done // total if total else 0)


def test_a_statement_that_runs_long_is_told_of_by_its_own_share():
    engine = _Engine()
    engine.percent = 50.0

    found = _told(engine, ("join", 1, 4), until=3, every_seconds=0.02)

    assert found[0] == ("join", 25, 100)
    assert set(found[1:]) == {("join", 37, 100)}
    assert len(found) >= 3


def test_a_step_without_a_statement_is_told_of_again_as_it_stands():
    found = _told(_Engine(), ("encode", 7, 1000), until=3, every_seconds=0.02)

    assert len(found) >= 3
    assert set(found) == {("encode", 7, 1000)}


def test_what_is_done_stays_done_whatever_runs():
    engine = _Engine()
    engine.percent = 50.0

    found = _told(engine, ("write", 6, 6), until=2, every_seconds=0.02)

    assert set(found) == {("write", 100, 100)}


def test_nothing_is_told_after_the_block_even_when_it_fails():
    found = []

    with pytest.raises(ZeroDivisionError), telling(
        _Engine(), lambda *call: found.append(call), 0.01
    ) as report:  # fmt: skip
        report("encode", 1, 2)
        raise ZeroDivisionError

    num_told = len(found)
    time.sleep(0.05)
    assert len(found) == num_told


def test_without_a_listener_no_thread_is_started():
    before = threading.active_count()

    with telling(_Engine(), None) as report:
        report("encode", 1, 2)
        assert threading.active_count() == before
