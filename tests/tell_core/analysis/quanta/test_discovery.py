"""What is said about clusters: pushes, purity, the verdict in words."""

import numpy as np
import pytest

from tell_core.analysis.quanta.discovery import (
    DiscoverySettings,
    centres,
    discover,
    purity,
    pushes,
    strongest,
)


def test_purity_is_one_where_every_cluster_has_one_output():
    assert purity(np.array([0, 0, 1, 1, 2, 2]), np.array([7, 7, 7, 7, 3, 3])) == 1


def test_purity_leaves_single_tokens_out():
    assert purity(np.array([0, 0, 1]), np.array([7, 8, 9])) == 0.5


def test_an_example_along_a_cluster_pushes_it_and_one_against_it_does_not():
    vectors = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    middles = centres(vectors, np.array([0, 0, 1, 1]))

    found = pushes(middles, np.array([[5.0, 0.0], [-1.0, 0.0], [0.0, 0.1]], dtype=np.float32))

    np.testing.assert_allclose(found, [[1, -1, 0], [0, 0, 1]], atol=1e-6)


def test_only_positive_pushes_are_named_strongest_first():
    assert strongest([0.1, -0.5, 0.9, 0.0], 3) == [2, 0]


@pytest.mark.parametrize("has_clusters", [True, False])
def test_the_verdict_says_whether_there_are_clusters(has_clusters: bool, barely_trained):
    model, examples, _ = barely_trained
    settings = DiscoverySettings(num_tokens=40, num_dimensions=64, floor=0, ceiling=9)
    found = discover(model, examples.select(range(60)), settings)

    object.__setattr__(found, "chance", (0.0,) * 19 if has_clusters else (1.0,) * 19)

    assert found.verdict.startswith("no evidence of clusters") != has_clusters
    assert ("commonest output" in found.verdict) == has_clusters
    assert f"p = {0.05 if has_clusters else 1:.2f}" in found.verdict


def test_the_best_of_five_replicates_is_no_evidence(barely_trained):
    model, examples, _ = barely_trained
    settings = DiscoverySettings(num_tokens=40, num_dimensions=64, floor=0, ceiling=9)
    found = discover(model, examples.select(range(60)), settings)

    object.__setattr__(found, "chance", (0.0,) * 5)

    assert not found.has_clusters
