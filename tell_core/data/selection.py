"""Selection beyond random: which general examples a budget takes first, and why.

Diversity is facility location: an order in which every next example adds most to how well the
chosen ones stand for the whole pool, so that a budget holds little of the same kind twice.
Alignment puts those first whose gradients on the base model point where the task's do. What is
chosen is a prefix of an order whatever the general budget, so choices are nested as random ones
are. The random choice is always run beside it: without that arm nothing is known of what selection
gains.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heapreplace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tell_core.data.budgets import choice_order, split_budget
from tell_core.data.encoding import IntArray
from tell_core.data.shingles import HASH_BITS, word_shingles
from tell_core.data.words import HashArray, hash_words
from tell_core.errors import TokenBudgetError

FloatArray = npt.NDArray[np.float32]
Similarities = npt.NDArray[np.uint8]
Batches = Callable[[], Iterable[Sequence[str]]]

NUM_FEATURES = 512
"""Columns of the hashed features; similarities are off by about 1 / sqrt(512) = 0.04."""
MAX_REFERENCES, MIN_REFERENCES = 8192, 256
_MAX_SIMILARITIES = 1 << 28  # bytes of the table of similarities of one pool
_SLOT_BITS = 22
_BATCH_ROWS = 1024
_LEAST_LENGTH = 1e-12
TASK_GRADIENTS, GENERAL_GRADIENTS = "task_train.npy", "general.npy"
_TEXT_COLUMNS = ("source", "system", "history", "prompt", "response")


def diverse_order(features: FloatArray, seed: int, purpose: str) -> IntArray:
    """The examples of a pool, each next one adding most to what the chosen ones stand for.

    Greedy facility location (Nemhauser, Wolsey, Fisher 1978) with lazy evaluation (Minoux 1978):
    the value of a choice is the sum, over reference examples, of the similarity to the nearest
    chosen example. References are the first examples of the seeded order of choice: all of the
    pool, or as many as keep the table of similarities within 256 MB, at most 8,192. Once all of
    them are matched by a chosen example nothing is left to gain, and the rest follows in the
    seeded order; ties go by it too.

    Args:
        features: Shape (N, D). One row of length 1 or 0 per example.
        seed: Seed of the order of choice, as in `choice_order`.
        purpose: Name of the pool.

    Returns:
        Shape (N,). A permutation of 0 to N - 1.
    """
    order = choice_order(len(features), seed, purpose)
    most = max(MIN_REFERENCES, _MAX_SIMILARITIES // max(len(features), 1))
    references = order[: min(most, MAX_REFERENCES)]
    similarities = _similarities(features[order], features[references])
    places = _greedy_places(similarities)
    left = np.ones(len(order), dtype=np.bool_)
    left[places] = False
    return np.concatenate([order[places], order[left]])


def _similarities(features: FloatArray, references: FloatArray) -> Similarities:
    """Shape (N, R). Cosines from 0 to 1 in 255 steps; what is negative counts as 0."""
    table = np.empty((len(features), len(references)), dtype=np.uint8)
    for start in range(0, len(features), _BATCH_ROWS):
        cosines = features[start : start + _BATCH_ROWS] @ references.T
        table[start : start + _BATCH_ROWS] = np.rint(255 * np.clip(cosines, 0, 1))
    return table


def _greedy_places(similarities: Similarities) -> IntArray:
    """Rows of the table in the order of their gains, until nothing is gained.

    A gain only shrinks as more is chosen, so an old one bounds the new one from above, and most
    rows need no second look.
    """
    bounds = similarities.sum(axis=1, dtype=np.int64)
    heap = [(-int(bound), place) for place, bound in enumerate(bounds)]
    heapify(heap)
    nearest, covered = np.zeros(similarities.shape[1], dtype=np.uint8), 0
    chosen: list[int] = []
    while heap and heap[0][0] < 0:
        _, place = heap[0]
        raised = np.maximum(similarities[place], nearest)
        gain = int(raised.sum(dtype=np.int64)) - covered
        heapreplace(heap, (-gain, place))
        if heap[0][1] == place and gain:
            nearest, covered = raised, covered + gain
            chosen.append(place)
            heapreplace(heap, (0, place))
    return np.asarray(chosen, dtype=np.int64)


def hashed_features(batches: Batches) -> FloatArray:
    """Texts as vectors: their words and pairs of words, weighted by rarity, hashed into columns.

    A word or pair counts once per text, with weight log(N / number of texts that hold it) (inverse
    document frequency); what stands in one text only tells nothing about the others and is left
    out. Signed hashing keeps products right on average (Weinberger et al. 2009).

    Args:
        batches: Gives all texts in batches, the same each time it is called: it is called twice.

    Returns:
        Shape (N, 512), float32. Rows of length 1, or 0 for a text that shares nothing.
    """
    counts, num_texts = np.zeros(1 << _SLOT_BITS, dtype=np.int64), 0
    for texts in batches():
        hashes, _ = _terms(texts)
        counts += np.bincount(_slots(hashes), minlength=len(counts))
        num_texts += len(texts)
    weights = np.where(counts > 1, np.log(num_texts / np.maximum(counts, 1)), 0.0)
    parts = [np.zeros((0, NUM_FEATURES), dtype=np.float32)]
    for texts in batches():
        hashes, rows = _terms(texts)
        parts.append(_vectors(hashes, rows, weights[_slots(hashes)], len(texts)))
    return np.concatenate(parts)


def _terms(texts: Sequence[str]) -> tuple[HashArray, IntArray]:
    """Shapes (T,), (T,). Hashes of each text's distinct words and pairs of words, and its place."""
    words = hash_words(texts)
    sets = [word_shingles(words, size) for size in (1, 2)]
    rows = [np.repeat(np.arange(len(texts)), one.sizes) for one in sets]
    return np.concatenate([one.hashes for one in sets]), np.concatenate(rows)


def _slots(hashes: HashArray) -> IntArray:
    return (hashes >> np.uint64(HASH_BITS - _SLOT_BITS)).astype(np.int64)


def _vectors(
    hashes: HashArray, rows: IntArray, weights: npt.NDArray[np.float64], num_texts: int
) -> FloatArray:
    columns = (hashes % np.uint64(NUM_FEATURES)).astype(np.int64)
    signs = 1.0 - 2.0 * ((hashes >> np.uint64(9)) & np.uint64(1)).astype(np.float64)
    cells = np.bincount(
        rows * NUM_FEATURES + columns, signs * weights, minlength=num_texts * NUM_FEATURES
    )
    vectors = cells.reshape(num_texts, NUM_FEATURES)
    return _unit(vectors.astype(np.float32))


def diverse_orders(corpus: Path, seed: int) -> Mapping[str, IntArray]:
    """The `diverse_order` of every source of a corpus, computed once per process.

    The features take 2 kB of memory an example, beside the table of similarities.

    Args:
        corpus: Parquet file of a curated corpus.
        seed: Seed of the orders.

    Returns:
        Source -> permutation of its examples, counted within the source from 0.
    """
    return _diverse_orders(corpus, corpus.stat().st_mtime_ns, seed)


@lru_cache(maxsize=8)
def _diverse_orders(corpus: Path, written_at: int, seed: int) -> Mapping[str, IntArray]:
    return {
        source: diverse_order(features, seed, source)
        for source, features in _features_by_source(corpus, written_at).items()
    }


@lru_cache(maxsize=1)
def _features_by_source(corpus: Path, written_at: int) -> Mapping[str, FloatArray]:
    del written_at  # only tells one writing of the file from the next
    sources = np.asarray(pq.read_table(corpus, columns=["source"])["source"].to_pylist())
    features = hashed_features(lambda: _texts(corpus))
    return {str(name): features[sources == name] for name in dict.fromkeys(sources.tolist())}


def _texts(corpus: Path) -> Iterable[Sequence[str]]:
    columns = list(_TEXT_COLUMNS[1:])
    for batch in pq.ParquetFile(corpus).iter_batches(_BATCH_ROWS, columns=columns):
        rows = batch.to_pylist()
        yield ["\n".join(filter(None, (row[name] for name in columns))) for row in rows]


def aligned_order(task: FloatArray, general: FloatArray, seed: int, purpose: str) -> IntArray:
    """The examples of a pool, those first whose gradient points where the task's does.

    An example's score is the cosine of its gradient to the mean of the task examples' gradients,
    each made length 1 first, so that neither long nor hard examples weigh more (as in LESS, Xia et
    al. 2024, without its warm-up and its weighting by Adam's moments). Equal scores go by the
    seeded order of choice, and so do examples without a gradient, which come last.

    Args:
        task: Shape (M, D), M >= 1. Projected gradients of the task examples.
        general: Shape (N, D). Projected gradients of the pool.
        seed: Seed of the order of choice.
        purpose: Name of the pool.

    Returns:
        Shape (N,). A permutation of 0 to N - 1.
    """
    direction = _unit(task).mean(axis=0)
    scores = _unit(general) @ direction
    scores = np.where(general.any(axis=1), scores, -np.inf)
    order = choice_order(len(general), seed, purpose)
    return order[np.argsort(-scores[order], kind="stable")]


def aligned_orders(
    gradients: Path, corpus: Path, task_rows: IntArray, seed: int
) -> Mapping[str, IntArray]:
    """The `aligned_order` of every source of a corpus for some task examples.

    Args:
        gradients: Directory written by `tell_core.alignment.write_gradients`.
        corpus: Parquet file of the general corpus.
        task_rows: Shape (M,). The task examples that may be looked at: those of the cell's budget.
        seed: Seed of the orders of choice.

    Returns:
        Source -> permutation of its examples, counted within the source from 0.
    """
    task = np.load(gradients / TASK_GRADIENTS, allow_pickle=False)[task_rows]
    general = np.load(gradients / GENERAL_GRADIENTS, mmap_mode="r", allow_pickle=False)
    sources = np.asarray(pq.read_table(corpus, columns=["source"])["source"].to_pylist())
    return {
        str(name): aligned_order(task, general[sources == name], seed, str(name))
        for name in dict.fromkeys(sources.tolist())
    }


def _unit(rows: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, _LEAST_LENGTH), dtype=np.float32)


def select_in_orders(
    token_counts: IntArray,
    source_names: Sequence[str] | npt.NDArray[np.str_],
    weights: Mapping[str, float],
    budget: int,
    orders: Mapping[str, IntArray],
) -> IntArray:
    """Choose examples of several sources within one budget, each source in a given order.

    As `select_from_sources` does, but for the orders: the same split over sources, whole examples,
    never over budget, a smaller budget's choice part of a larger one's.

    Args:
        token_counts: Shape (N,). Tokens per example.
        source_names: Length N. Source of each example.
        weights: Relative share of each source.
        budget: Upper bound on the sum of chosen counts, in tokens.
        orders: Source -> permutation of its examples, counted within the source from 0.

    Returns:
        Shape (K,), K >= 1. Indices into ``token_counts``, source by source in order of choice.

    Raises:
        TokenBudgetError: No source's share holds the first example of its order.
    """
    names = np.asarray(source_names)
    pools = {name: np.flatnonzero(names == name) for name in weights}
    ordered = {name: rows[orders[name]] for name, rows in pools.items() if len(rows)}
    available = [int(token_counts[rows].sum()) for rows in ordered.values()]
    shares = split_budget(budget, [weights[name] for name in ordered], available)
    chosen = [np.empty(0, dtype=np.int64)]
    for rows, share in zip(ordered.values(), shares, strict=True):
        used = np.cumsum(token_counts[rows], dtype=np.int64)
        chosen.append(rows[: int(np.searchsorted(used, share, side="right"))])
    if not any(map(len, chosen)):
        raise TokenBudgetError(
            f"a general budget of {budget} tokens holds no example: with"
            f" {len(ordered)} sources none has a share as large as the first example of its order."
            " Give a larger budget, or lower `curation.max_tokens`."
        )
    return np.concatenate(chosen)
