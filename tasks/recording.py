"""Recording in MLflow while cells train, from one thread that nothing waits for.

Training never depends on it: a store that is away, hangs or refuses is tried again, less and less
often, and `tracking.track_cells` records at the end what is missing by then.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from tasks.cell_news import followed_by
from tasks.cell_runs import CellRuns
from tasks.tracking import BRIEF_SECONDS, brief_requests, connect
from tell_core.errors import StoreError
from tell_core.pipeline import CellOutcome
from tell_core.spec.cells import Cell

logger = logging.getLogger(__name__)

EVERY_SECONDS = 12.0  # between two looks at logs and machine
LONGEST_PAUSE_SECONDS = 600.0  # between two tries of a store that is away
CLOSE_SECONDS = 15.0  # longest wait at the end, of which no request begins in the last 10
_TRIES = 3
_SAID = 200  # most characters of an error that a warning quotes


@contextmanager
def recorded_meanwhile(root: Path, record: Mapping[str, Any] | None) -> Iterator[None]:
    """Record what happens in the block as it happens, except where nothing is tracked.

    Args:
        root: The run directory.
        record: Its MLflow runs, or None when nothing is tracked.
    """
    if record is None:
        yield
        return
    with brief_requests():
        recorder = Recorder(root, record)
        try:
            with followed_by(recorder):
                yield
        finally:
            recorder.close()


@dataclass
class _News:
    """Something to be recorded.

    Attributes:
        record: Does it; doing it twice changes nothing.
        num_failed: How often it failed while the store answered.
    """

    record: Callable[[CellRuns], None]
    num_failed: int = 0


class _UntilClosed:
    """A tracking client that begins no request any more when it is to leave the store to others.

    Args:
        client: Does what is asked.
        is_over: Whether it is to refuse.
    """

    def __init__(self, client: MlflowClient, is_over: Callable[[], bool]) -> None:
        self._client = client
        self._is_over = is_over

    def __getattr__(self, name: str) -> Any:
        if self._is_over():
            raise StoreError("the rest is recorded at the end")
        return getattr(self._client, name)


class Recorder:
    """A thread that opens, follows and closes the runs of cells, and measures the machine.

    Args:
        root: The run directory.
        record: Its MLflow runs.
    """

    def __init__(self, root: Path, record: Mapping[str, Any]) -> None:
        self._root = root
        self._record = record
        self._news: deque[_News] = deque()
        self._under_way: dict[Cell, CellOutcome] = {}
        self._runs: CellRuns | None = None
        self._machine: Any = None
        self._next_look = 0.0
        self._last_request = math.inf  # when one may begin for the last time
        self._wake = threading.Event()
        self._is_closed = self._is_failing = False
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def begun(self, expect: Callable[[], CellOutcome]) -> None:
        """Open the run of a cell, and follow its training."""
        self._add(lambda runs: self._begin(runs, expect()))

    def finished(self, outcome: CellOutcome) -> None:
        """Record all of a cell."""
        self._add(partial(self._finish, outcome=outcome))

    def failed(self, cell: Cell) -> None:
        """Mark the run of a cell that ended without an outcome."""
        self._add(partial(self._fail, cell=cell))

    def close(self) -> None:
        """End the thread; waits for what it is at, but not for a store that does not answer.

        A thread that is left behind begins nothing more: `track_cells` is about to record the same.
        """
        self._last_request = time.monotonic() + CLOSE_SECONDS - BRIEF_SECONDS
        self._is_closed = True
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("MLflow took longer than %.0f s for a record", CLOSE_SECONDS)

    def _add(self, record: Callable[[CellRuns], None]) -> None:
        self._news.append(_News(record))
        self._wake.set()

    def _work(self) -> None:
        pause = EVERY_SECONDS
        while not self._is_closed:
            if self._is_done(self._look):
                pause = EVERY_SECONDS
            else:
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            self._wake.wait(pause)
            self._wake.clear()
        if self._runs is not None:
            self._is_done(self._measure_last)

    def _is_over(self) -> bool:
        return time.monotonic() > self._last_request

    def _is_done(self, step: Callable[[], None]) -> bool:
        """Do something with the store, unless it fails; a first failure is told."""
        try:
            step()
        except Exception as error:  # of whatever kind: training goes on, and the end tries again
            if not (self._is_failing or self._is_closed):
                said = " ".join(str(error).split())[:_SAID]
                logger.warning("MLflow: recorded later, training goes on (%s)", said)
            self._is_failing, self._runs = True, None
            return False
        self._is_failing = False
        return True

    def _look(self) -> None:
        """Record the news; from time to time also what logs and machine say."""
        if self._runs is None:
            client = _UntilClosed(connect(self._root), self._is_over)
            self._runs = CellRuns(client, self._record)  # type: ignore[arg-type]
        for _ in range(len(self._news)):
            if self._is_closed:
                return
            self._take(self._news.popleft(), self._runs)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + EVERY_SECONDS
            self._measure()
            for outcome in tuple(self._under_way.values()):
                self._runs.follow(outcome)

    def _take(self, news: _News, runs: CellRuns) -> None:
        try:
            news.record(runs)
        except Exception:
            news.num_failed += 1
            if news.num_failed < _TRIES:
                self._news.append(news)
            raise

    def _begin(self, runs: CellRuns, outcome: CellOutcome) -> None:
        if not runs.is_finished(outcome):
            self._under_way[outcome.cell] = outcome
            runs.follow(outcome)

    def _finish(self, runs: CellRuns, outcome: CellOutcome) -> None:
        self._under_way.pop(outcome.cell, None)
        runs.record(outcome)

    def _fail(self, runs: CellRuns, cell: Cell) -> None:
        if outcome := self._under_way.pop(cell, None):
            runs.fail(outcome)

    def _measure(self) -> None:
        """Log what the machine did since the last look; the first look is the beginning."""
        if self._machine is None:
            self._machine = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
                self._record["parent"], resume_logging=True
            )
            self._machine.collect_metrics()
            for one in self._machine.monitors:
                one.clear_metrics()
            return
        self._machine.collect_metrics()
        self._machine.publish_metrics(self._machine.aggregate_metrics())

    def _measure_last(self) -> None:
        self._measure()
        self._machine.mlflow_logger.flush()
