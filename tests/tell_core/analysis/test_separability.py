import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.separability import (
    document_fixture,
    grouped_auc,
    plain_auc,
    projection,
    separability,
)
from tell_core.errors import AnalysisError


def test_effects_of_documents_leak_into_a_plain_probe_and_not_into_a_grouped_one() -> None:
    states, is_task, documents = document_fixture()

    grouped, plain = grouped_auc(states, is_task, documents, 0), plain_auc(states, is_task, 0)

    assert 0.35 <= grouped <= 0.65
    assert plain > 0.9


def test_without_a_signal_the_permutation_test_says_so() -> None:
    found = separability(*document_fixture(), num_permutations=19)

    assert found.p_value > 0.05
    assert found.num_documents == 40


def test_a_signal_is_found() -> None:
    states, is_task, documents = document_fixture()
    states[is_task, :8] += 6

    found = separability(states, is_task, documents, num_permutations=19)

    assert found.auc > 0.95
    assert found.p_value == 0.05


def test_too_few_documents_of_a_class_are_refused() -> None:
    with pytest.raises(AnalysisError, match="9 task and 11 general"):
        separability(np.zeros((20, 2)), np.arange(20) < 9, np.arange(20))


@given(st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_projection_has_the_direction_of_largest_variance_first(seed: int) -> None:
    states = np.random.default_rng(seed).normal(size=(30, 5))

    points = projection(states)

    assert points.shape == (30, 2)
    assert points[:, 0].std() >= points[:, 1].std()
