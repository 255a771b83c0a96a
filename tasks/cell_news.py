"""News of cells, for whoever follows them while others still work.

Cells on a cluster begin in other processes: of those only the end is heard here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tell_core.pipeline import CellOutcome
from tell_core.spec.cells import Cell


class Follower(Protocol):
    """Whoever is told of cells; must return at once and raise nothing."""

    def begun(self, expect: Callable[[], CellOutcome]) -> None:
        """A cell begins to train; ``expect`` tells what it will leave behind, which takes time."""

    def finished(self, outcome: CellOutcome) -> None:
        """A cell is evaluated."""

    def failed(self, cell: Cell) -> None:
        """A cell ended without an outcome."""


_followers: list[Follower] = []


@contextmanager
def followed_by(follower: Follower) -> Iterator[None]:
    """Tell ``follower`` of all cells of this process while the block runs."""
    _followers.append(follower)
    try:
        yield
    finally:
        _followers.remove(follower)


def tell_begun(expect: Callable[[], CellOutcome]) -> None:
    """Pass on that a cell begins."""
    for follower in tuple(_followers):
        follower.begun(expect)


def tell_finished(outcome: CellOutcome) -> None:
    """Pass on that a cell is evaluated."""
    for follower in tuple(_followers):
        follower.finished(outcome)


def tell_failed(cell: Cell) -> None:
    """Pass on that a cell ended without an outcome."""
    for follower in tuple(_followers):
        follower.failed(cell)
