"""Metrics over labels against scikit-learn and the plain definitions."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from tell_core.errors import InputError
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.model import MetricSpec
from tests.tell_core.evaluation.examples import (
    LABELS,
    TOLERANCE,
    item,
    items_of,
    metric_of,
    score,
)

few = settings(max_examples=40, deadline=None)
label_pairs = st.lists(
    st.tuples(st.sampled_from([*LABELS, "other", None]), st.sampled_from(LABELS)),
    min_size=1,
    max_size=30,
)

SKLEARN: dict[str, Callable[[list[str], list[str]], float]] = {
    "accuracy": sk.accuracy_score,
    "mcc": sk.matthews_corrcoef,
    "balanced_accuracy": lambda gold, found: float(
        np.mean([np.mean([f == g for f, g in zip(found, gold, strict=True) if g == label])
                 for label in set(gold)])
    ),
    "macro_f1": lambda gold, found: sk.f1_score(
        gold, found, labels=sorted(set(gold)), average="macro", zero_division=0
    ),
    "label_f1": lambda gold, found: sk.f1_score(
        gold, found, labels=["yes"], average="macro", zero_division=0
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SKLEARN)
@pytest.mark.filterwarnings("ignore::UserWarning")
@few
@given(pairs=label_pairs)
def test_label_metrics_equal_scikit_learn(name: str, pairs: list[tuple[str | None, str]]) -> None:
    metric = metric_of(name, labels=LABELS)
    gold = [reference for _, reference in pairs]
    found = [label if label in LABELS else "no label" for label, _ in pairs]

    expected = SKLEARN[name](gold, found)

    assert score(metric, items_of(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@few
@given(label_pairs)
def test_balanced_accuracy_equals_scikit_learn_on_known_labels(
    pairs: list[tuple[str | None, str]],
) -> None:
    gold = [reference for _, reference in pairs]
    known = [(label if label in gold else gold[0], reference) for label, reference in pairs]

    expected = sk.balanced_accuracy_score(gold, [label for label, _ in known])

    assert score(metric_of("balanced_accuracy"), items_of(known)) == pytest.approx(expected)


def test_reference_label_comes_from_the_named_column() -> None:
    items = [item("1", "ignored", gold=1), item("true", "ignored", gold=True)]

    assert score(metric_of("accuracy", field="gold"), items) == 1.0


def test_reference_label_outside_labels_is_refused_with_the_item() -> None:
    with pytest.raises(InputError, match=r"test-0 is 'yes', which is none of `labels` \(A, B\)"):
        metric_of("accuracy", labels=("A", "B")).payloads(items_of([("A", "yes")]))


def test_positive_label_that_never_occurs_is_refused() -> None:
    metric = build_metric(MetricSpec(name="label_f1", positive="Yes"))

    with pytest.raises(InputError, match="no reference is 'Yes'; the labels are no, yes"):
        metric.payloads(items_of([("no", "no"), ("yes", "yes")]))
