"""Candidate quanta: clusters of gradients by their cosine, and how far they can be trusted.

Average linkage on cosine distance; the number of clusters is the one that subsamples agree on. An
eigengap is not used: it found 4 clusters where 20 were planted.

Shape letters: S samples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from tell_core.analysis.quanta.nulls import structureless
from tell_core.data.seeding import seeded_generator

Array = npt.NDArray[np.floating]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NUM_DRAWS = 10
DRAW_SHARE = 0.8
NUM_NULLS = 19
"""Replicates without clusters: the fewest among which standing out has p <= 0.05."""
# Every number of clusters up to this is tried, then about 20 more on a logarithmic grid.
_DENSE_UP_TO = 40
_NUM_SPARSE = 20


@dataclass(frozen=True)
class Clustering:
    """Clusters of S samples, the largest first.

    Attributes:
        labels: Shape (S,). Cluster of each sample, from 0.
        num_clusters: How many there are.
        stability: Number of clusters -> agreement of subsamples (mean adjusted Rand index).
    """

    labels: IntArray
    num_clusters: int
    stability: dict[int, float]

    @property
    def agreement(self) -> float:
        """Agreement of subsamples at the chosen number of clusters."""
        return self.stability[self.num_clusters]


def cosine_distances(vectors_SD: Array) -> FloatArray:
    """1 minus the cosine of every pair, shape (S, S), symmetric, 0 on the diagonal.

    A vector of zeros has distance 1 to every other.
    """
    vectors = vectors_SD.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    distances = np.clip(1 - unit @ unit.T, 0, 2)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    return np.asarray(distances)


def tree_of(distances_SS: FloatArray) -> FloatArray:
    """The average-linkage tree of a matrix of distances, as SciPy writes it."""
    return np.asarray(linkage(squareform(distances_SS, checks=False), method="average"))


def cut(tree: FloatArray, num_clusters: int) -> IntArray:
    """Labels from 0, the largest cluster first; fewer clusters where joins are at equal heights."""
    labels = np.asarray(fcluster(tree, num_clusters, criterion="maxclust"), dtype=np.int64) - 1
    return by_size(labels)


def by_size(labels: IntArray) -> IntArray:
    """The same clusters, numbered from the largest; ties in the order of their old numbers."""
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return np.asarray(ranks[labels], dtype=np.int64)


def cluster_gradients(
    vectors_SD: Array,
    *,
    counts: Sequence[int] | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Clustering:
    """Cluster by cosine and choose how many clusters by their stability.

    The tree is grown on ``num_draws`` subsamples of 80 %, cut into each of ``counts`` clusters, and
    neighbouring draws are compared on the samples they share. Chosen is the largest number of
    clusters whose agreement is within one standard error of the best.

    Args:
        vectors_SD: Shape (S, D), S >= 5. Gradients, or projections of them.
        counts: Numbers of clusters to try; by default `default_counts`.
        num_draws: Subsamples, at least 2.
        seed: Seed of the subsamples.
    """
    distances = cosine_distances(vectors_SD)
    chosen, stability = _most_stable(distances, counts, num_draws, seed)
    return Clustering(cut(tree_of(distances), chosen), chosen, stability)


def _most_stable(
    distances_SS: FloatArray, counts: Sequence[int] | None, num_draws: int, seed: int
) -> tuple[int, dict[int, float]]:
    """The largest number of clusters within one standard error of the best, and all agreements."""
    counts = counts or default_counts(len(distances_SS))
    agreements = _agreements(distances_SS, counts, num_draws, seed)
    means = agreements.mean(axis=1)
    best = int(means.argmax())
    margin = float(agreements[best].std(ddof=1) / np.sqrt(agreements.shape[1]))
    chosen = max(
        count for count, mean in zip(counts, means, strict=True) if mean >= means[best] - margin
    )
    return chosen, dict(zip(counts, means.tolist(), strict=True))


def null_agreements(
    vectors_SD: Array,
    *,
    counts: Sequence[int] | None = None,
    num_replicates: int = NUM_NULLS,
    seed: int = 0,
) -> list[float]:
    """Agreement of subsamples of vectors without clusters: what chance and choice give.

    Subsamples share most of their samples, so they agree to some extent on anything, and on some
    number of clusters they agree best: each replicate chooses its own, as the data did.

    Args:
        vectors_SD: Shape (S, D). The data; replicates share its spectrum.
        counts: Numbers of clusters to try; those that were tried on the data.
        num_replicates: How many sets of vectors.
        seed: Seed of the vectors and of the subsamples.
    """
    found = []
    for vectors in structureless(vectors_SD, "spectrum", num_replicates, seed):
        chosen, stability = _most_stable(cosine_distances(vectors), counts, NUM_DRAWS, seed)
        found.append(stability[chosen])
    return found


def chance_p_value(agreement: float, chance: Sequence[float]) -> float:
    """How often vectors without clusters are agreed on as well; never below 1 / (replicates + 1).

    Args:
        agreement: Agreement of subsamples of the data.
        chance: Those of `null_agreements`.
    """
    return (1 + sum(one >= agreement for one in chance)) / (1 + len(chance))


def default_counts(num_samples: int) -> list[int]:
    """All numbers of clusters from 2 to 40, then a logarithmic grid up to a quarter of S."""
    last = max(2, num_samples // 4)
    dense = range(2, min(_DENSE_UP_TO, last) + 1)
    if last <= _DENSE_UP_TO:
        return list(dense)
    sparse = np.geomspace(_DENSE_UP_TO + 1, last, _NUM_SPARSE).round().astype(int)
    return sorted({*dense, *sparse.tolist()})


def draws_of(num_samples: int, num_draws: int, seed: int) -> list[IntArray]:
    """Seeded subsamples of 80 %, indices rising."""
    size = max(3, round(DRAW_SHARE * num_samples))
    return [
        np.sort(seeded_generator(seed, "quanta draws", draw).permutation(num_samples)[:size])
        for draw in range(num_draws)
    ]


def _agreements(
    distances: FloatArray, counts: Sequence[int], num_draws: int, seed: int
) -> FloatArray:
    """Adjusted Rand index of neighbouring draws, shape (counts, draws)."""
    draws = draws_of(len(distances), num_draws, seed)
    trees = [tree_of(distances[np.ix_(draw, draw)]) for draw in draws]
    shared = [
        np.intersect1d(draw, after, assume_unique=True, return_indices=True)[1:]
        for draw, after in zip(draws, [*draws[1:], draws[0]], strict=True)
    ]
    found = np.empty((len(counts), num_draws))
    for place, count in enumerate(counts):
        labels = [cut(tree, count) for tree in trees]
        for draw, (left, right) in enumerate(shared):
            after = labels[(draw + 1) % num_draws]
            found[place, draw] = _adjusted_rand_index(labels[draw][left], after[right])
    return found


def spectral_labels(vectors_SD: Array, num_clusters: int, seed: int = 0) -> IntArray:
    """Spectral clustering of angular similarity: what arXiv 2303.13506 does.

    For comparison only: it flattens clusters of unequal size.
    """
    from sklearn.cluster import SpectralClustering

    similarity = 1 - np.arccos(np.clip(1 - cosine_distances(vectors_SD), -1, 1)) / np.pi
    labels = SpectralClustering(
        num_clusters, affinity="precomputed", assign_labels="kmeans", random_state=seed
    ).fit_predict(similarity)
    return by_size(np.asarray(labels, dtype=np.int64))


def agreement(labels: IntArray, others: Sequence[object] | IntArray) -> float:
    """Adjusted Rand index of two groupings of the same samples: 1 the same, about 0 unrelated."""
    _, numbers = np.unique(np.asarray(others), return_inverse=True)
    return _adjusted_rand_index(labels, numbers)


def _adjusted_rand_index(first: IntArray, second: IntArray) -> float:
    """The index of Hubert and Arabie (1985) of two groupings, both numbered from 0.

    scikit-learn's spends nearly all of its time on looking at its arguments, and a discovery asks
    for 12,000 of them.
    """
    joint = first * (int(second.max()) + 1) + second
    together, left, right = (_num_pairs(np.bincount(one)) for one in (joint, first, second))
    every = len(first) * (len(first) - 1) / 2
    by_chance, most = left * right / max(every, 1), (left + right) / 2
    return (together - by_chance) / (most - by_chance) if most > by_chance else 1.0


def _num_pairs(sizes: IntArray) -> float:
    """Pairs of samples within groups of these sizes."""
    return float((sizes * (sizes - 1)).sum() / 2)
