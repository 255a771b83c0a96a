"""Progress on the console: bars on a terminal, plain lines elsewhere."""

import sys
import threading
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tasks.progress import DONE, ENDED, TOTAL, listen


class ConsoleProgress:
    """Shows all announced progress while the block runs."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._is_terminal = self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._total: TaskID | None = None
        self._num_cells = 0
        self._num_done = 0
        self._lines: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ConsoleProgress":
        self._silence = listen(self._on_progress)
        if self._is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._silence()
        if self._is_terminal:
            self._bars.stop()

    def _on_progress(self, label: str, phase: str, done: int, total: int) -> None:
        with self._lock:
            if label == TOTAL:
                self._set_total(total)
            elif phase == DONE:
                self._finish(label)
            elif phase == ENDED:
                self._remove(label)
            elif self._is_terminal:
                self._show(label, phase, done, total)

    def _set_total(self, num_cells: int) -> None:
        self._num_cells = num_cells
        if self._total is None:
            self._total = self._bars.add_task("cells", total=num_cells)
        else:
            self._bars.update(self._total, total=num_cells)

    def _finish(self, label: str) -> None:
        self._num_done += 1
        self._remove(label)
        if self._total is not None:
            self._bars.update(self._total, completed=self._num_done)
        if not self._is_terminal:
            line = f"[{self._num_done}/{self._num_cells}] {label}"
            self._bars.console.print(line, highlight=False, markup=False)

    def _remove(self, label: str) -> None:
        if label in self._lines:
            self._bars.remove_task(self._lines.pop(label))

    def _show(self, label: str, phase: str, done: int, total: int) -> None:
        if label not in self._lines:
            self._lines[label] = self._bars.add_task(label, total=total)
        self._bars.update(
            self._lines[label], description=f"{label} · {phase}", completed=done, total=total
        )
