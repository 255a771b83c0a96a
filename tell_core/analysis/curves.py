"""Learning curves: the mean score of an arm at each budget, with an interval over seeds and items.

Shape letters: D draws, R = D + 1 rows (the estimate, then the draws), S seeds, N items,
K statistics per item.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tell_core.analysis.resampling import FloatArray, Resampling, interval, seed_deviations
from tell_core.errors import AnalysisError

ONE_SEED = "one seed: how much another seed would change the score is unknown"
NO_SCORE = "the score is not defined on these items"
_BLOCK = 256  # draws: their weights stay in the processor's cache from one seed to the next


class ScoresFromWeights(Protocol):
    """Scores of reweighted samples: statistics (N, K) and weights (D, N) to scores (D,)."""

    def __call__(self, statistics: FloatArray, weights: FloatArray, /) -> FloatArray:
        """The scores."""


@dataclass(frozen=True)
class CurvePoint:
    """Scores of one arm at one task budget and one general budget.

    Attributes:
        arm: Name of the arm.
        task_budget_tokens: Task budget, or None for an arm without task data.
        general_budget_tokens: General budget, or None.
        task_tokens: Shape (S,). Task tokens really used, by seed.
        seeds: The S seeds.
        scores: Shape (S,). Score of each seed over all items.
        item_draws: Shape (S, D). Score of each seed in each resample of the items.
        num_items: N.
        varies_with_seed: Whether another seed could give another score; not so for the base model.
    """

    arm: str
    task_budget_tokens: int | None
    general_budget_tokens: int | None
    task_tokens: FloatArray
    seeds: tuple[int, ...]
    scores: FloatArray
    item_draws: FloatArray
    num_items: int
    varies_with_seed: bool = True

    def select(self, seeds: Sequence[int]) -> "CurvePoint":
        """The same point with these seeds only."""
        index = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            task_tokens=self.task_tokens[index],
            scores=self.scores[index],
            item_draws=self.item_draws[index],
        )

    def rows(self, resampling: Resampling) -> FloatArray:
        """Mean score, as it is and then in each draw of items and seeds, shape (R,).

        Rows of points with the same seeds and items belong together.
        """
        deviations = seed_deviations(len(self.seeds), resampling)
        draws = self.item_draws.mean(axis=0) + deviations @ self.scores
        return np.concatenate([[self.scores.mean()], draws])


def score_trainings(
    statistics: Sequence[FloatArray], weights: FloatArray, scores_from_weights: ScoresFromWeights
) -> tuple[FloatArray, FloatArray]:
    """Scores of S trainings on the same items, as they are and in every resample.

    Args:
        statistics: S arrays of shape (N, K), items in the same order.
        weights: Shape (D, N), from `item_weights`.
        scores_from_weights: The metric.

    Returns:
        Scores (S,) and their draws (S, D).

    Raises:
        AnalysisError: The trainings were not all scored on N items.
    """
    num_draws, num_items = weights.shape
    if wrong := {len(one) for one in statistics} - {num_items}:
        raise AnalysisError(
            f"a cell was scored on {wrong.pop()} items, others on {num_items}: leverage compares"
            " cells on the same items. Evaluate them again with one specification."
        )
    everything = np.ones((1, num_items))
    scores = np.stack([scores_from_weights(one, everything)[0] for one in statistics])
    draws = np.empty((len(statistics), num_draws))
    for start in range(0, num_draws, _BLOCK):
        block = weights[start : start + _BLOCK]
        for row, one in zip(draws, statistics, strict=True):
            row[start : start + _BLOCK] = scores_from_weights(one, block)
    return scores, draws


def curve_row(
    point: CurvePoint,
    resampling: Resampling,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Any]:
    """One entry of ``curves`` in leverage.json.

    The interval covers seeds and items and ends where scores do, at ``limits``. With one seed
    there is none (null, with the reason), unless the score does not vary with the seed: then the
    interval covers items.
    """
    low, high, reason = _interval_of(point, resampling)
    pairs = zip(point.seeds, point.scores.tolist(), strict=True)
    return {
        "arm": point.arm,
        "task_budget_tokens": point.task_budget_tokens,
        "general_budget_tokens": point.general_budget_tokens,
        "task_tokens": float(point.task_tokens.mean()),
        "mean": finite_or_none(float(point.scores.mean())),
        "low": low if low is None else max(low, limits[0]),
        "high": high if high is None else min(high, limits[1]),
        "reason": reason,
        "num_items": point.num_items,
        "seeds": [{"seed": seed, "score": finite_or_none(score)} for seed, score in pairs],
    }


def finite_or_none(value: float) -> float | None:
    """``value``, or None for NaN and infinities, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _interval_of(
    point: CurvePoint, resampling: Resampling
) -> tuple[float | None, float | None, str | None]:
    if not np.isfinite(point.scores).all():
        return None, None, NO_SCORE
    if point.varies_with_seed and len(point.seeds) < 2:
        return None, None, ONE_SEED
    draws = point.rows(resampling)[1:]
    is_missing = np.isnan(draws)
    lower, upper = np.where(is_missing, -np.inf, draws), np.where(is_missing, np.inf, draws)
    return (*interval(lower, upper, resampling.confidence), None)
