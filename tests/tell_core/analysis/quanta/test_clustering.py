"""Clusters: planted ones are found, absent ones are not believed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from tell_core.analysis.quanta.clustering import (
    agreement,
    by_size,
    chance_p_value,
    cluster_gradients,
    cosine_distances,
    cut,
    default_counts,
    null_agreements,
    spectral_labels,
    tree_of,
)
from tell_core.analysis.quanta.controls import planted_mixture


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_numbering_by_size_keeps_the_groups(labels):
    _, dense = np.unique(labels, return_inverse=True)

    numbered = by_size(dense)

    assert agreement(numbered, labels) == pytest.approx(1)
    sizes = np.bincount(numbered)
    assert (np.diff(sizes) <= 0).all()


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_agreement_is_the_adjusted_rand_index(pairs):
    first, second = np.array(pairs).T

    assert agreement(first, second) == pytest.approx(adjusted_rand_score(first, second))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6))
def test_the_length_of_a_gradient_does_not_matter(seed: int, scale: float):
    vectors = np.random.default_rng(seed).standard_normal((8, 5))
    scaled = vectors * np.geomspace(1, scale, 8)[:, None]

    np.testing.assert_allclose(cosine_distances(scaled), cosine_distances(vectors), atol=1e-9)


def test_a_gradient_of_zeros_is_far_from_all():
    distances = cosine_distances(np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1]]))

    assert distances[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("num_clusters", [3, 7])
def test_planted_clusters_are_found_with_their_number(num_clusters: int):
    vectors, groups = planted_mixture(100, num_clusters, 64, noise=0.7, seed=1)

    found = cluster_gradients(vectors)

    assert found.num_clusters == num_clusters
    assert agreement(found.labels, groups) > 0.99


def test_clusters_of_unequal_size_are_found():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), [60, 30, 15, 8, 6, 4])
    centres = generator.standard_normal((6, 64))[groups]
    vectors = centres + 0.7 * generator.standard_normal((len(groups), 64))

    assert agreement(cluster_gradients(vectors).labels, groups) > 0.95


def test_spectral_clustering_finds_clusters_of_equal_size():
    vectors, groups = planted_mixture(90, 3, 64, noise=0.7, seed=1)

    assert agreement(spectral_labels(vectors, 3), groups) > 0.95


def test_vectors_without_clusters_seldom_pass_for_clustered():
    p_values = []
    for seed in range(10):
        vectors = np.random.default_rng(seed).standard_normal((16, 8))
        p_values.append(
            chance_p_value(cluster_gradients(vectors).agreement, null_agreements(vectors))
        )

    assert np.mean(np.array(p_values) <= 0.05) <= 0.1


def test_each_replicate_chooses_its_own_number_of_clusters():
    vectors = np.random.default_rng(3).standard_normal((40, 20))

    free = np.array(null_agreements(vectors, num_replicates=5))
    fixed = np.array(null_agreements(vectors, counts=[4], num_replicates=5))

    assert (free != fixed).any()
    assert free.mean() > fixed.mean()


@given(chance=st.lists(st.floats(0, 1), min_size=1, max_size=40), found=st.floats(0, 1))
def test_a_p_value_counts_the_data_among_its_replicates(chance: list[float], found: float):
    p_value = chance_p_value(found, chance)

    assert 1 / (len(chance) + 1) <= p_value <= 1
    assert (p_value == 1 / (len(chance) + 1)) == (found > max(chance))


def test_planted_clusters_are_agreed_on_more_than_vectors_without():
    vectors, _ = planted_mixture(80, 6, 50, noise=0.7, seed=0)
    found = cluster_gradients(vectors)

    chance = null_agreements(vectors)

    assert found.agreement > max(chance) + 0.1
    assert chance_p_value(found.agreement, chance) == 0.05


def test_the_same_seed_finds_the_same():
    vectors, _ = planted_mixture(80, 4, 20, noise=1.0, seed=0)

    first, second = (cluster_gradients(vectors, seed=5) for _ in range(2))

    assert (first.labels == second.labels).all()
    assert first.stability == second.stability


@settings(deadline=None)
@given(num_samples=st.integers(8, 3000))
def test_numbers_of_clusters_rise_and_leave_four_samples_to_each(num_samples: int):
    counts = default_counts(num_samples)

    assert counts == sorted(set(counts))
    assert counts[0] == 2
    assert counts[-1] <= max(2, num_samples // 4)


def test_a_cut_has_as_many_clusters_as_asked_for():
    vectors = np.random.default_rng(0).standard_normal((30, 5))

    labels = cut(tree_of(cosine_distances(vectors)), 7)

    assert len(np.unique(labels)) == 7
