"""Reading finished cells: their scores on the same items, and the losses of their probe items."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tell_core.analysis.curves import CurvePoint, score_trainings
from tell_core.analysis.resampling import FloatArray, Resampling, item_weights
from tell_core.errors import AnalysisError
from tell_core.evaluation.base import PREDICTIONS_FILE, SCORES_FILE, Metric
from tell_core.evaluation.metrics import metric_statistics
from tell_core.spec.arms import parse_arm
from tell_core.store import read_json

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AnalysedCell:
    """A finished cell and where its outputs lie.

    Attributes:
        name: Name of the cell.
        arm: Name of its arm.
        task_budget_tokens: Task budget, or None.
        general_budget_tokens: General budget, or None.
        seed: Its seed.
        task_tokens: Task tokens really used; 0 without task data.
        mixed: Directory of its mix stage.
        trained: Directory of its train stage, or None.
        evaluated: Directory of its evaluate stage.
    """

    name: str
    arm: str
    task_budget_tokens: int | None
    general_budget_tokens: int | None
    seed: int
    task_tokens: int
    mixed: Path
    trained: Path | None
    evaluated: Path

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "AnalysedCell":
        """Read what `CellOutcome.record` gives; paths may be strings."""
        return cls(
            name=record["cell"],
            arm=record["arm"],
            task_budget_tokens=record["task_budget_tokens"],
            general_budget_tokens=record["general_budget_tokens"],
            seed=record["seed"],
            task_tokens=int(record["ledger"]["task_tokens"] or 0),
            mixed=Path(record["mix"]),
            trained=Path(record["train"]) if record["train"] else None,
            evaluated=Path(record["evaluate"]),
        )

    @property
    def group(self) -> tuple[str, int | None, int | None]:
        """What cells that differ in their seed alone have in common."""
        return self.arm, self.task_budget_tokens, self.general_budget_tokens


class ItemStatistics:
    """Per-item statistics of every metric and cell, the same items in the same order.

    Attributes:
        metrics: The metrics that have items; without held-out general data there are none for
            its log-probability.

    Raises:
        AnalysisError: A file is missing or damaged, or cells were scored on different items.
        StoreError: There is no scores.json.
    """

    def __init__(
        self,
        cells: Sequence[AnalysedCell],
        metrics: Sequence[Metric],
        on_progress: Progress | None = None,
    ) -> None:
        self._cells = cells
        self._statistics: dict[tuple[str, str], FloatArray] = {}
        self._repeats: dict[tuple[str, str], Sequence[float]] = {}
        self._items: dict[str, tuple[str, list[str]]] = {}
        self._weights: dict[tuple[int, Resampling], FloatArray] = {}
        for done, cell in enumerate(cells, start=1):
            self._read(cell, metrics)
            if on_progress:
                on_progress("reading predictions", done, len(cells))
        named = {name for _, name in self._statistics}
        self.metrics = tuple(metric for metric in metrics if metric.name in named)

    def _read(self, cell: AnalysedCell, metrics: Sequence[Metric]) -> None:
        """Read the statistics of every kind of items, and the scores of repeated decodings."""
        by_file: dict[str, list[Metric]] = {}
        for metric in metrics:
            by_file.setdefault(metric.items_file, []).append(metric)
        for file, concerned in by_file.items():
            path = cell.evaluated / file
            # Only test items are always there; that all cells have the same is checked anyway.
            rows = read_lines(path) if file == PREDICTIONS_FILE or path.exists() else []
            self._check_items(cell, file, [row["item_id"] for row in rows])
            for metric in concerned if rows else ():
                self._statistics[cell.name, metric.name] = metric_statistics(metric, rows)
        for name, entry in read_json(cell.evaluated / SCORES_FILE).items():
            self._repeats[cell.name, name] = entry.get("repeats") or ()

    def points(self, metric: Metric, resampling: Resampling) -> list[CurvePoint]:
        """Scores of ``metric``, cells that differ in their seed alone put together."""
        groups: dict[tuple[str, int | None, int | None], list[AnalysedCell]] = {}
        for cell in self._cells:
            groups.setdefault(cell.group, []).append(cell)
        num_items = len(self._statistics[self._cells[0].name, metric.name])
        weights = self._item_weights(num_items, resampling)
        return [self._point(metric, group, weights) for group in groups.values()]

    def repeats(self, metric: Metric, point: CurvePoint) -> list[Sequence[float]]:
        """Scores of repeated decodings, for each seed of ``point``; empty where there are none."""
        group = point.arm, point.task_budget_tokens, point.general_budget_tokens
        cells = [cell for cell in self._cells if cell.group == group]
        return [self._repeats.get((cell.name, metric.name), ()) for cell in cells]

    def _point(
        self, metric: Metric, cells: Sequence[AnalysedCell], weights: FloatArray
    ) -> CurvePoint:
        statistics = [self._statistics[cell.name, metric.name] for cell in cells]
        scores, draws = score_trainings(statistics, weights, metric.scores_from_weights)
        arm = parse_arm(cells[0].arm)
        return CurvePoint(
            *cells[0].group,
            task_tokens=np.asarray([cell.task_tokens for cell in cells], dtype=np.float64),
            seeds=tuple(cell.seed for cell in cells),
            scores=scores,
            item_draws=draws,
            num_items=weights.shape[1],
            varies_with_seed=arm.is_trained or arm.has_shots,
        )

    def _item_weights(self, num_items: int, resampling: Resampling) -> FloatArray:
        """The draws of items, made once: all metrics on the same items share them."""
        key = num_items, resampling
        if key not in self._weights:
            self._weights[key] = item_weights(num_items, resampling)
        return self._weights[key]

    def _check_items(self, cell: AnalysedCell, file: str, items: list[str]) -> None:
        first, expected = self._items.setdefault(file, (cell.name, items))
        if items != expected:
            raise AnalysisError(
                f"cell {cell.name} was scored on {len(items)} items in {file}, cell {first} on"
                f" {len(expected)}, and they are not the same: leverage compares cells on the same"
                " items in the same order. Evaluate both again with one specification."
            )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file.

    Raises:
        AnalysisError: The file is missing or a line is not JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise AnalysisError(
            f"cannot read {path}: {error}. Run the experiment again; only what is missing is done."
        ) from error
