"""Where the progress of long work goes: the console's listener and a Prefect artifact."""

import logging
import time
from collections.abc import Callable
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tell_core.lanes import ProgressFile

logger = logging.getLogger(__name__)

Listener = Callable[[str, str, int, int], None]

# A training shorter than this gets no artifact: it is over before a person could look.
_ARTIFACT_AFTER_SECONDS = 10.0
_ARTIFACT_EVERY_SECONDS = 5.0
_ARTIFACT_AFTER_FAILURE_SECONDS = 60.0

# Label under which the number of cells is announced.
TOTAL = "cells"
# Phases that end a label: of a cell or a comparison that counts, and of other work.
DONE, ENDED = "done", "ended"

_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Tell ``listener(label, phase, done, total)`` of all progress; returns how to stop it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def announce(label: str, phase: str, done: int, total: int) -> None:
    """Pass progress on to the listeners."""
    for listener in tuple(_listeners):
        listener(label, phase, done, total)


def announce_total(num_cells: int) -> None:
    """Tell the listeners how many cells there are, so far as is known."""
    announce(TOTAL, "cells", 0, num_cells)


class Watch:
    """Follows a progress file: to the listeners at once, to a Prefect artifact now and then.

    Args:
        label: What is done, for people.
        file: Where its progress stands.
        num_tokens: Tokens of the whole work, where it is counted in them.
    """

    def __init__(self, label: str, file: ProgressFile, num_tokens: int | None = None) -> None:
        self.label = label
        self.file = file
        self.num_tokens = num_tokens
        self._next_artifact = time.monotonic() + _ARTIFACT_AFTER_SECONDS
        self._artifact: UUID | None = None
        # Phase, when it was first seen, and what was done by then: waiting before is no work.
        self._seen: tuple[str, float, int] = ("", 0.0, 0)

    def __call__(self) -> None:
        """Look at the file and pass on what it says."""
        if (state := self.file.read()) is None:
            return
        phase, done, total = state
        announce(self.label, phase, done, total)
        if phase != self._seen[0]:
            self._seen = phase, time.monotonic(), done
        if time.monotonic() >= self._next_artifact and TaskRunContext.get():
            self._next_artifact = time.monotonic() + _ARTIFACT_EVERY_SECONDS
            self._show(100.0 * done / max(total, 1), self.describe(phase, done, total))

    def close(self, summary: str) -> None:
        """Forget the file; an artifact that was shown ends full, with what came out."""
        self.file.path.unlink(missing_ok=True)
        if self._artifact is not None:
            self._show(100.0, f"{self.label}: {summary}")

    def describe(self, phase: str, done: int, total: int) -> str:
        """The state in words: units done, tokens where known, and the time left."""
        parts = [f"{self.label}: {phase} {done:,} of {total:,}"]
        if self.num_tokens is not None and phase == "training":
            seen = round(self.num_tokens * done / max(total, 1))
            parts.append(f"{seen:,} of {self.num_tokens:,} tokens")
        _, since, before = self._seen
        if done > before:
            left = (time.monotonic() - since) * (total - done) / (done - before)
            parts.append(f"about {left:,.0f} s left")
        return ", ".join(parts)

    def _show(self, percent: float, text: str) -> None:
        """Show it on the page; a server that does not answer costs the news, never the work.

        Prefect's own five tries would hold the caller up for more than a minute, then fail it.
        """
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                self._send(percent, text)
        except (httpx.HTTPError, RuntimeError) as error:
            logger.warning("%s: its progress could not be shown (%s)", self.label, error)
            self._next_artifact = time.monotonic() + _ARTIFACT_AFTER_FAILURE_SECONDS

    def _send(self, percent: float, text: str) -> None:
        if self._artifact is None:
            artifact = create_progress_artifact(progress=percent, description=text)
            self._artifact = artifact if isinstance(artifact, UUID) else None
        else:
            update_progress_artifact(self._artifact, progress=percent, description=text)
