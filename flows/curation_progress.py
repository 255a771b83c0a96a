"""Curation's progress on the console: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tell_core.data.telling import Progress as OnProgress

_LINE_EVERY_SECONDS = 5.0
_HUNDRED = 100


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """Show what is told on the standard error stream while the block runs.

    Args:
        console: Where to show it instead.

    Yields:
        What to tell progress to: name of a step, units done, units in all.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("curate", total=None)
        yield lambda step, done, total: bars.update(
            bar, description=f"curate · {step}", completed=done, total=total
        )


class _Lines:
    """A line at most every five seconds, the first after as many."""

    def __init__(self, console: Console):
        self._console = console
        self._next = time.monotonic() + _LINE_EVERY_SECONDS

    def __call__(self, step: str, done: int, total: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LINE_EVERY_SECONDS
        how_far = f"{done} %" if total == _HUNDRED else f"{done:,} of {total:,}"
        line = f"curate · {step}: {how_far}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
