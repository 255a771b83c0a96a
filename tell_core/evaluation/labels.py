"""Metrics over labels.

Shape letters: N items, C labels, D draws of item weights.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from tell_core.errors import InputError
from tell_core.evaluation.base import (
    FloatArray,
    Metric,
    Payload,
    ScoredItem,
    mean_where,
    normalised,
    ratio,
)
from tell_core.spec.model import MetricSpec


class LabelMetric(Metric):
    """A metric over labels.

    The reference label is ``field`` of the test data if it is there, else the parsed reference.
    The labels are ``labels``, or all that occur among the references. A prediction that is none of
    them, or unparsable, is "no label": it is wrong for its item and right for none. With
    ``normalise`` labels are compared as `ExactMatch` compares texts.

    Statistics, K = 3C: for each label 1 if prediction and reference are it, if the prediction is,
    if the reference is.
    """

    options = frozenset({"field", "labels", "normalise"})
    has_item_scores = False

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Reference label, and predicted label or None."""
        references = [self._label(self._reference(item)) for item in items]
        texts = [item.predicted_text for item in items]
        labels = self._labels(references)
        self._check(items, references, labels)
        found = [None if text is None else self._label(text) for text in texts]
        pairs = zip(references, found, strict=True)
        return [[reference, label if label in labels else None] for reference, label in pairs]

    def statistics(self, payloads: Sequence[Payload]) -> FloatArray:
        """Indicators of the labels in sorted order, shape (N, 3C)."""
        labels = sorted(self._labels([reference for reference, _ in payloads]))
        columns = {label: column for column, label in enumerate(labels)}
        pairs = [[columns[reference], columns.get(found, -1)] for reference, found in payloads]
        indices = np.asarray(pairs, dtype=np.int64).reshape(-1, 2, 1)
        is_label = indices == np.arange(len(labels))
        gold, predicted = is_label[:, 0], is_label[:, 1]
        return np.concatenate([gold & predicted, predicted, gold], axis=1, dtype=float)

    def _label(self, text: str) -> str:
        return normalised(text) if self.spec.normalise else text.strip()

    def _labels(self, references: Iterable[str]) -> set[str]:
        given = self.spec.labels
        return set(references) if given is None else {self._label(label) for label in given}

    def _check(self, items: Sequence[ScoredItem], references: list[str], labels: set[str]) -> None:
        for item, reference in zip(items, references, strict=True):
            if reference not in labels:
                raise InputError(
                    f"metric {self.name!r}: the reference of test item {item.item_id} is"
                    f" {_shortened(reference)!r}, which is none of `labels`"
                    f" ({', '.join(sorted(labels))}). Correct `labels` or `field`."
                )


class Accuracy(LabelMetric):
    """Share of items whose predicted label is the reference label.

    Reads high when one label dominates; report `BalancedAccuracy` or `Mcc` beside it.
    """

    name = "accuracy"
    has_item_scores = True

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        correct, _, gold = _label_counts(sums)
        return ratio(correct.sum(axis=1), gold.sum(axis=1))


class BalancedAccuracy(LabelMetric):
    """Mean recall over the labels that occur among the references (of each sample)."""

    name = "balanced_accuracy"

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        correct, _, gold = _label_counts(sums)
        return mean_where(ratio(correct, gold), gold > 0)


class MacroF1(LabelMetric):
    """Mean F1 over the labels that occur among the references (of each sample).

    A label that is predicted but never a reference lowers the precision of no label here; it
    costs its items their recall.
    """

    name = "macro_f1"

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        correct, predicted, gold = _label_counts(sums)
        return mean_where(ratio(2 * correct, predicted + gold), gold > 0)


class Mcc(LabelMetric):
    """Matthews correlation coefficient, for any number of labels (R_K of Gorodkin 2004).

    "No label" is a predicted class of its own. 0 when predictions or references are constant.
    """

    name = "mcc"
    limits = (-1.0, 1.0)

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        correct, predicted, gold = _label_counts(sums)
        num_items = gold.sum(axis=1)
        unlabelled = num_items - predicted.sum(axis=1)
        covariance = correct.sum(axis=1) * num_items - (predicted * gold).sum(axis=1)
        spread_predicted = num_items**2 - (predicted**2).sum(axis=1) - unlabelled**2
        spread_gold = num_items**2 - (gold**2).sum(axis=1)
        return ratio(covariance, np.sqrt(np.maximum(spread_predicted * spread_gold, 0.0)))


class LabelF1(LabelMetric):
    """F1 of the label ``positive``; 0 when it is neither predicted nor a reference.

    An unparsable prediction is a missed positive where the reference is positive, and no false
    alarm where it is not.
    """

    name = "label_f1"
    options = frozenset({"field", "labels", "normalise", "positive"})

    def __init__(self, spec: MetricSpec) -> None:
        super().__init__(spec)
        if spec.positive is None:
            raise InputError(
                "metric 'label_f1' needs the label whose F1 is meant: add `positive`, for example"
                " {name: label_f1, positive: 'yes'}"
            )
        self.positive = self._label(spec.positive)

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Whether reference and prediction are positive: 1 or 0 each."""
        pairs = super().payloads(items)
        return [[int(label == self.positive) for label in pair] for pair in pairs]

    def statistics(self, payloads: Sequence[Payload]) -> FloatArray:
        """Shape (N, 3): positive in both, in the prediction, in the reference."""
        gold, predicted = np.asarray(payloads, dtype=np.float64).reshape(-1, 2).T
        return np.stack([gold * predicted, predicted, gold], axis=1)

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        return ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])

    def _check(self, items: Sequence[ScoredItem], references: list[str], labels: set[str]) -> None:
        super()._check(items, references, labels)
        if self.positive not in labels:
            raise InputError(
                f"metric 'label_f1': no reference is {self.spec.positive!r}; the labels are"
                f" {', '.join(map(_shortened, sorted(labels)))}. Correct `positive`, or name all"
                " `labels`."
            )


def _label_counts(sums: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights of right, predicted and reference labels, each (D, C)."""
    correct, predicted, gold = np.split(sums, 3, axis=1)
    return correct, predicted, gold


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
