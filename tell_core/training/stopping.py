"""How a process that was asked to stop (SIGTERM) spends the time until it is killed."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tell_core.errors import SpecError

STOP_VARIABLE = "TELL_STOP_SECONDS"


def stop_seconds(default: float = math.inf) -> float:
    """Seconds from SIGTERM until a training is killed, by the environment's `STOP_VARIABLE`.

    Args:
        default: Where the environment says nothing; infinite: who stops it waits for its end.

    Raises:
        SpecError: What the environment says is no number of seconds.
    """
    given = os.environ.get(STOP_VARIABLE)
    if not given:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise SpecError(
            f"{STOP_VARIABLE} is {given!r}: give the seconds from SIGTERM until a training is"
            " killed, such as 30, or leave it unset"
        )
    return seconds


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; only the main thread can watch for it."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)
