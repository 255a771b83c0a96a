"""What a metric is: per-item statistics that add up, and a score computed from their sums.

Every metric splits into two halves. `Metric.payloads` looks at texts and writes a short list of
numbers (or labels) per item, which is stored with the predictions. `Metric.scores_from_weights`
sees only those, so that a bootstrap of thousands of draws needs neither texts nor sacreBLEU.

Shape letters: N items, K statistics per item, D draws of item weights.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from tell_core.errors import InputError
from tell_core.evaluation.parsing import Answer, value_text

if TYPE_CHECKING:
    from tell_core.spec.model import MetricSpec

FloatArray = npt.NDArray[np.float64]
Payload = list[Any]

SCORES_FILE = "scores.json"
PREDICTIONS_FILE = "predictions.jsonl"
GENERAL_ITEMS_FILE = "general_items.jsonl"
RETENTION_ITEMS_FILE = "retention_items.jsonl"
_ITEMS_FILES = {
    "test": PREDICTIONS_FILE,
    "general": GENERAL_ITEMS_FILE,
    "retention": RETENTION_ITEMS_FILE,
}


@dataclass(frozen=True)
class ScoredItem:
    """What a metric may look at.

    Attributes:
        item_id: Name of the item in messages.
        prediction: The parsed prediction; None when nothing was generated.
        reference: The parsed reference.
        extra: Remaining columns of the test data.
        nll: Negative log-likelihood of the gold response, its end-of-turn token included, in nats.
        num_tokens: Supervised tokens of the gold response, at least 1.
        num_bytes: UTF-8 bytes of the gold response.
        prompt: The bare prompt, without anchor prompt and chat template.
    """

    item_id: str
    prediction: Answer | None
    reference: Answer
    extra: Mapping[str, Any]
    nll: float
    num_tokens: int
    num_bytes: int
    prompt: str = ""

    @property
    def predicted_text(self) -> str | None:
        """The answer in the prediction, or None when there is none."""
        return None if self.prediction is None else self.prediction.value


class Metric(ABC):
    """A metric with its options.

    Attributes:
        name: Name in tables; in specifications too, but for a metric of the user's own.
        higher_is_better: Direction.
        items: Kind of the items that it is computed on: "test", "general" (held-out general
            examples), "retention", or "harness/" and the task's name.
        needs_generation: Whether it looks at generated text.
        options: Fields of MetricSpec that mean something to it, besides the name.
        has_item_scores: Whether the score of a single item is defined.
        limits: Lowest and highest score there can be.
    """

    name: str
    higher_is_better: bool = True
    items: str = "test"
    needs_generation: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset({"field"})
    has_item_scores: ClassVar[bool] = True
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec

    @property
    def signature(self) -> str | None:
        """What else must be known to reproduce the score (sacreBLEU's signature), or None."""
        return None

    @property
    def items_file(self) -> str:
        """File in the directory of an evaluation that holds its items' statistics."""
        return items_file(self.items)

    @abstractmethod
    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Statistics of each item as a list that JSON can hold.

        Raises:
            InputError: A reference does not fit the metric.
        """

    def check_references(self, items: Sequence[ScoredItem]) -> None:
        """Find, before anything is trained, what would make `payloads` fail later.

        Args:
            items: The test items, without predictions.

        Raises:
            InputError: A reference does not fit the metric, or something is not installed.
        """
        self.payloads(items)

    def statistics(self, payloads: Sequence[Payload]) -> FloatArray:
        """Payloads as an array of shape (N, K): numbers that add up over items."""
        width = len(payloads[0]) if payloads else 0
        return np.asarray(payloads, dtype=np.float64).reshape(len(payloads), width)

    def scores_from_weights(self, statistics: FloatArray, weights: FloatArray) -> FloatArray:
        """Scores of D reweighted samples of the items.

        Args:
            statistics: Shape (N, K), from `metric_statistics`.
            weights: Shape (D, N). How often each item is in each sample, >= 0.

        Returns:
            Shape (D,). NaN for a sample without items.
        """
        draws = np.asarray(weights, dtype=np.float64)
        if not len(statistics):
            return np.full(len(draws), np.nan)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scores = self._score_sums(draws @ statistics)
        return np.where(draws.any(axis=1), scores, np.nan)

    def score_from_items(self, statistics: FloatArray) -> float:
        """Score of all items, each counted once; NaN without items."""
        return float(self.scores_from_weights(statistics, np.ones((1, len(statistics))))[0])

    def item_scores(self, statistics: FloatArray) -> list[float | None]:
        """Score of each item alone, where that is defined."""
        if not self.has_item_scores or not len(statistics):
            return [None] * len(statistics)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scores = self._score_sums(statistics)
        return [float(score) for score in scores]

    @abstractmethod
    def _score_sums(self, sums: FloatArray) -> FloatArray:
        """Scores (D,) from weighted sums of the statistics (D, K)."""

    def _reference(self, item: ScoredItem) -> str:
        """The reference column where one is named and present, else the parsed reference.

        Raises:
            InputError: There is neither.
        """
        field = self.spec.field
        if field is not None and field in item.extra:
            value = value_text(item.extra[field])
        else:
            value = item.reference.value
        if value is None:
            raise InputError(
                f"metric {self.name!r}: test item {item.item_id} has no reference answer: its"
                " response cannot be read as `evaluation.parse` says"
                + (f" and its column {field!r} holds nothing" if field else "")
                + ". Correct the test data or `evaluation.parse`."
            )
        return value


class MeanMetric(Metric):
    """The mean of one value per item. Statistics, K = 2: the value, and 1."""

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """One number per item."""
        return [[self._value(item)] for item in items]

    def statistics(self, payloads: Sequence[Payload]) -> FloatArray:
        """Shape (N, 2)."""
        values = super().statistics(payloads)
        return np.concatenate([values, np.ones_like(values)], axis=1)

    @abstractmethod
    def _value(self, item: ScoredItem) -> float:
        """The value of one item."""

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        return sums[:, 0] / sums[:, 1]


def items_file(kind: str) -> str:
    """Name of the file with the statistics of a kind of items, see `Metric.items`."""
    return _ITEMS_FILES.get(kind) or re.sub(r"[^A-Za-z0-9._-]", "_", kind) + ".jsonl"


def normalised(text: str) -> str:
    """``text`` without case, punctuation and runs of white space; itself if nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c).startswith("P") else c for c in folded)
    return " ".join(kept.split()) or text.strip()


def ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Quotient, 0 where the denominator is 0."""
    is_zero = denominator == 0
    return np.where(is_zero, 0.0, numerator / np.where(is_zero, 1.0, denominator))


def mean_where(values: FloatArray, is_counted: npt.NDArray[np.bool_]) -> FloatArray:
    """Mean along axis 1 over the counted entries, 0 where there is none."""
    return ratio(np.where(is_counted, values, 0.0).sum(axis=1), is_counted.sum(axis=1))
