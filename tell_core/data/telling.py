"""Telling: progress of curation, also while one statement of the data engine runs long.

Work in batches tells how far it is by itself. A statement of the data engine returns when it is
done, which over millions of rows takes minutes; a thread beside it asks the engine and tells.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import duckdb

Progress = Callable[[str, int, int], None]
"""Called with a step's name, units done and units in all."""

EVERY_SECONDS = 2.0
_HUNDRED = 100


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""
    del step, done, total


@contextmanager
def telling(
    connection: duckdb.DuckDBPyConnection,
    on_progress: Progress | None,
    every_seconds: float = EVERY_SECONDS,
) -> Iterator[Progress]:
    """Pass progress on, and tell again whenever nothing was told for ``every_seconds``.

    Steps of fewer than 100 units are told in percent: while a statement runs, its own share counts
    as a part of the unit at work. A unit that takes several statements begins anew with each.

    Args:
        connection: Whose statements are watched.
        on_progress: Who is told, from this thread or from another, never from both at once.
        every_seconds: Longest silence.

    Yields:
        What the steps tell their progress to.
    """
    if on_progress is None:
        yield silent
        return
    pulse, ended = _Pulse(connection, on_progress), threading.Event()
    beats = threading.Thread(target=pulse.beat, args=(ended, every_seconds), daemon=True)
    beats.start()
    try:
        yield pulse
    finally:
        ended.set()
        beats.join()


class _Pulse:
    """What was told last and when; one thread tells at a time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, on_progress: Progress):
        self._connection = connection
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._last: tuple[str, int, int] | None = None
        self._told_at = 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        with self._lock:
            self._last = step, done, total
            self._tell(0.0)

    def beat(self, ended: threading.Event, every_seconds: float) -> None:
        """Tell of a step that is silent for too long, until ``ended``."""
        while not ended.wait(every_seconds / 2):
            with self._lock:
                if self._last and time.monotonic() - self._told_at >= every_seconds / 2:
                    # Negative while no statement runs, or none that began long enough ago.
                    self._tell(max(self._connection.query_progress(), 0.0))

    def _tell(self, percent: float) -> None:
        """Tell the last step, the statement at work being done by ``percent``."""
        assert self._last is not None, "nothing was begun"
        step, done, total = self._last
        if total < _HUNDRED:
            share = _HUNDRED * done + (percent if done < total else 0.0)
            done, total = int(share / max(total, 1)), _HUNDRED
        self._told_at = time.monotonic()
        self._on_progress(step, done, total)
