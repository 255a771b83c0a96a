"""Promotion: whether one model beats another on the same test items, and how sure that is.

What is compared are two models as they are, weights and all; so the items are resampled and not the
training seeds. Every draw takes the same items for both models (paired bootstrap, Efron and
Tibshirani 1993, chapter 8), which removes what makes items easy or hard for either.

Shape letters: D draws, N items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tell_core.analysis.resampling import FloatArray, Resampling, interval, item_weights
from tell_core.errors import InputError
from tell_core.evaluation.base import Metric
from tell_core.evaluation.metrics import metric_statistics

Rows = Sequence[Mapping[str, Any]]
MIN_ITEMS = 2


@dataclass(frozen=True)
class Comparison:
    """A model against another one, or against itself on other items.

    Attributes:
        metric: Name of the metric.
        score: Score of the model in question.
        other_score: Score that it is compared with.
        difference: How much better the model in question is, in units of the metric; negative
            where it is worse, whatever the metric's direction.
        low: Lower end of the difference's interval; None where it has none.
        high: Upper end; None likewise.
        confidence: Coverage of the interval.
        num_items: Items of the model in question.
        num_draws: Draws of the bootstrap.
        is_paired: Whether both scores are on the same items.
    """

    metric: str
    score: float
    other_score: float
    difference: float
    low: float | None
    high: float | None
    confidence: float
    num_items: int
    num_draws: int
    is_paired: bool

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high is not None and self.high < 0

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return asdict(self) | {"is_better": self.is_better, "is_worse": self.is_worse}

    def sentence(self, model: str, other: str) -> str:
        """The comparison in words; ``model`` and ``other`` name the two."""
        level = f"{100 * self.confidence:g} %"
        ends = "no interval" if self.low is None or self.high is None else _ends(self, level)
        return (
            f"{model} has {self.metric} {self.score:.4g}, {other} {self.other_score:.4g} on"
            f" {self.num_items} items: better by {self.difference:.4g} ({ends})"
        )


def compare_paired(metric: Metric, rows: Rows, others: Rows, resampling: Resampling) -> Comparison:
    """Compare two models on the same items.

    Args:
        metric: A metric on test items.
        rows: What the model in question did: per item its digest ``item`` and ``stats``.
        others: What the other model did, in any order.
        resampling: Coverage, number and seed of the draws.

    Raises:
        InputError: The items differ, or there are fewer than two.
        EvaluationError: An item has no statistics of the metric.
    """
    rows, others = _sorted(rows), _sorted(others)
    if [row["item"] for row in rows] != [row["item"] for row in others]:
        raise InputError(
            f"the two models were tested on different items ({len(rows)} and {len(others)}):"
            " evaluate one of them on the items of the other first"
        )
    weights = item_weights(_enough(rows), resampling)
    return _comparison(metric, rows, others, weights, weights, resampling)


def compare_unpaired(
    metric: Metric, rows: Rows, others: Rows, resampling: Resampling
) -> Comparison:
    """Compare scores on different items; for instance those of one model now and before.

    Args:
        metric: A metric on test items.
        rows: What was done on the items in question: per item its digest ``item`` and ``stats``.
        others: The same for the items that they are compared with.
        resampling: Coverage, number and seed of the draws.

    Raises:
        InputError: There are fewer than two items on a side.
        EvaluationError: An item has no statistics of the metric.
    """
    weights = item_weights(_enough(rows), resampling)
    # Another seed: equal numbers of items would else be drawn alike.
    apart = resampling._replace(seed=resampling.seed + 1)
    other_weights = item_weights(_enough(others), apart)
    return _comparison(metric, rows, others, weights, other_weights, resampling)


def same_items(rows: Rows, others: Rows) -> bool:
    """Whether both are results on the same items, in whatever order."""
    return sorted(row["item"] for row in rows) == sorted(row["item"] for row in others)


def _comparison(
    metric: Metric,
    rows: Rows,
    others: Rows,
    weights: FloatArray,
    other_weights: FloatArray,
    resampling: Resampling,
) -> Comparison:
    statistics, other_statistics = (
        metric_statistics(metric, rows),
        metric_statistics(metric, others),
    )
    sign = 1.0 if metric.higher_is_better else -1.0
    draws = sign * (
        metric.scores_from_weights(statistics, weights)
        - metric.scores_from_weights(other_statistics, other_weights)
    )
    is_missing = np.isnan(draws)
    low, high = interval(
        np.where(is_missing, -np.inf, draws),
        np.where(is_missing, np.inf, draws),
        resampling.confidence,
    )
    score, other = metric.score_from_items(statistics), metric.score_from_items(other_statistics)
    return Comparison(
        metric=metric.name,
        score=score,
        other_score=other,
        difference=sign * (score - other),
        low=low,
        high=high,
        confidence=resampling.confidence,
        num_items=len(rows),
        num_draws=resampling.num_draws,
        is_paired=weights is other_weights,
    )


def _sorted(rows: Rows) -> Rows:
    """By digest; items that stand twice among the tested ones have equal results."""
    return sorted(rows, key=lambda row: str(row["item"]))


def _enough(rows: Rows) -> int:
    if len(rows) < MIN_ITEMS:
        raise InputError(
            f"{len(rows)} test items show nothing of how sure a score is; needed are at least"
            f" {MIN_ITEMS}, better hundreds"
        )
    return len(rows)


def _ends(compared: Comparison, level: str) -> str:
    return f"{level}: {compared.low:.4g} to {compared.high:.4g}"
