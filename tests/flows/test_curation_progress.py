import io

import pytest
from rich.console import Console

from flows.curation_progress import shown_progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr("flows.curation_progress.time.monotonic", lambda: now[0])
    return now


def _console(*, is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=80)


def test_a_pipe_gets_a_line_every_five_seconds(clock):
    console = _console(is_terminal=False)

    with shown_progress(console) as report:
        for second in range(12):
            clock[0] = float(second)
            report("encode", 1000 * second, 12_000)

    assert console.file.getvalue().splitlines() == [
        "curate · encode: 5,000 of 12,000",
        "curate · encode: 10,000 of 12,000",
    ]


def test_short_work_leaves_a_pipe_clean(clock):
    console = _console(is_terminal=False)

    with shown_progress(console) as report:
        report("encode", 0, 1)

    assert console.file.getvalue() == ""


def test_names_from_data_are_no_markup(clock):
    console = _console(is_terminal=False)

    with shown_progress(console) as report:
        clock[0] = 6.0
        report("read [red]x[/red], 5 rows", 0, 100)

    assert console.file.getvalue() == "curate · read [red]x[/red], 5 rows: 0 %\n"


def test_a_terminal_gets_a_bar_with_the_step():
    console = _console(is_terminal=True)

    with shown_progress(console) as report:
        report("read [red]x[/red]", 30, 100)

    assert "curate · read [red]x[/red]" in console.file.getvalue()
    assert "30%" in console.file.getvalue()
