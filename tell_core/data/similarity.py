"""Similarity: which examples are alike, by MinHash for candidates and exact sets for the decision.

Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec, Rajaraman, Ullman,
*Mining of Massive Datasets*, ch. 3); whether two are alike is then decided by the exact Jaccard
similarity of their word shingles, so that the sketch costs recall at most, never precision.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tell_core.data.seeding import seeded_generator
from tell_core.data.shingles import PhraseCounts, ShingleSets, shared_sizes, word_shingles
from tell_core.data.telling import Progress, silent
from tell_core.data.words import (
    HashArray,
    IndexArray,
    Words,
    WordStore,
    joined,
    mixed,
    text_digests,
)
from tell_core.data.workspace import fetch_one, insert_table, stream_columns

FloatArray = npt.NDArray[np.float64]
SHINGLE_WORDS = 5
MIN_SHINGLES = 20
STOCK_EXAMPLES = 50
_WINDOW_WORDS, _MAX_CHANGED = 10, 3
_MAX_ALIGNED_WORDS = 4000
TEMPLATE_ALLOWANCE = 0.1
_MISS_RATE = 1e-4
_MAX_HASHES = 160
_BAND_BASE = 0x9FB21C651E98DF25
_BATCH_ROWS = 512
_PAIRS_AT_ONCE = 8192
_BANDS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SimilarPairs:
    """Pairs of rows whose prompts are alike.

    Attributes:
        first: Shape (P,). The earlier row of each pair.
        second: Shape (P,). The later row.
        prompt_similarity: Shape (P,). Jaccard similarity of the prompts; 1 for the same words.
        similarity: Shape (P,). Jaccard similarity of the whole texts.
        same_answer: Shape (P,). Whether responses and whole texts are alike too.
    """

    first: IndexArray
    second: IndexArray
    prompt_similarity: FloatArray
    similarity: FloatArray
    same_answer: npt.NDArray[np.bool_]


def band_shape(similarity: float) -> tuple[int, int]:
    """How many bands of how many hashes each.

    The widest bands with which a pair of exactly this similarity is missed at most once in 10,000.

    Returns:
        Number of bands and hashes per band; their product is at most 160.
    """
    shapes = []
    for width in range(1, _MAX_HASHES + 1):
        num_bands = math.ceil(math.log(_MISS_RATE) / math.log1p(-(min(similarity, 0.999) ** width)))
        if num_bands * width > _MAX_HASHES:
            break
        shapes.append((num_bands, width))
    return shapes[-1] if shapes else (_MAX_HASHES, 1)


def count_phrases(store: WordStore, run_words: int, report: Progress = silent) -> PhraseCounts:
    """In how many examples each run of words stands."""
    counts, done = PhraseCounts(store.num_words), 0
    for words in store.batches(_BATCH_ROWS):
        report(f"count runs of {run_words} words", done, store.num_examples)
        sets = word_shingles(joined(words), run_words)
        counts.add(sets)
        done += len(sets.sizes)
    return counts


def find_similar(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    counts: PhraseCounts,
    similarity: float,
    report: Progress = silent,
) -> Iterator[SimilarPairs]:
    """All pairs of examples whose prompts are alike and whose whole texts share a band.

    Memory holds some thousand pairs at a time; sketches and candidates lie in the data engine,
    which spills them.

    Two texts are alike when the Jaccard similarity of their runs of 5 words reaches ``similarity``,
    and that of the runs which stand in at most 50 examples is lower by 0.1 at most: what more
    examples share is a template, and its fillings decide. A prompt or response with fewer than 20
    runs beside templates is alike only to the same words; an example with fewer in all is left to
    exact matching. Examples of which each has a passage that the other lacks are not alike
    (`has_other_passage`): they ask different things of the same long text.

    Args:
        connection: Where candidates are joined.
        store: The examples' words.
        counts: Of the same examples.
        similarity: Between 0 and 1.
        report: Told of the examples sketched, the parts joined and the candidates compared.

    Yields:
        The pairs in rising order, some thousand candidates at a time.
    """
    _sketch(connection, store, counts, similarity, report)
    _join_bands(connection, report)
    num_candidates, done = fetch_one(connection, _ABOUT_HOW_MANY), 0
    for batch in stream_columns(connection, _CANDIDATES, _PAIRS_AT_ONCE):
        report("compare candidates", min(done, num_candidates), num_candidates)
        pairs = np.stack([batch["first"], batch["second"]], axis=1)
        yield _verified(store, counts, pairs, similarity)
        done += len(pairs)
    connection.execute("drop table candidates")


_ABOUT_HOW_MANY = "select approx_count_distinct(hash(first, second)) from candidates"
_CANDIDATES = "select distinct first, second from candidates order by first, second"


def _join_bands(connection: duckdb.DuckDBPyConnection, report: Progress) -> None:
    """Fill the table `candidates` with the pairs that share a band, a part of the keys at a time.

    No join's table is larger than some hundred megabytes, however many bands there are.
    """
    connection.execute("create table candidates (first bigint, second bigint)")
    num_parts = 1 + fetch_one(connection, "select count(*) from bands") // _BANDS_AT_ONCE
    for part in range(num_parts):
        report("join candidates", part, num_parts)
        connection.execute(
            "insert into candidates select a.place, b.place from"
            " (select * from bands where key % $1 = $2) a"
            " join (select * from bands where key % $1 = $2) b"
            " on a.key = b.key and a.place < b.place",
            [num_parts, part],
        )
    connection.execute("drop table bands")


def signatures(sets: ShingleSets, num_hashes: int) -> npt.NDArray[np.uint32]:
    """MinHash signatures: the least of each set under ``num_hashes`` random orders.

    An order multiplies the 32 upper bits of the shingles' hashes by an odd number modulo 2^32.

    Args:
        sets: N sets, none of them empty.
        num_hashes: Length of a signature.

    Returns:
        Shape (num_hashes, N), uint32.
    """
    factors = seeded_generator(0, "minhash").integers(0, 1 << 31, num_hashes, dtype=np.uint32)
    values = (sets.hashes >> np.uint64(21)).astype(np.uint32)
    least = np.empty((num_hashes, len(sets.sizes)), dtype=np.uint32)
    product = np.empty_like(values)
    for place, factor in enumerate(2 * factors + np.uint32(1)):
        np.multiply(values, factor, out=product)
        np.minimum.reduceat(product, sets.offsets[:-1], out=least[place])
    return least


def _sketch(
    connection: duckdb.DuckDBPyConnection,
    store: WordStore,
    counts: PhraseCounts,
    similarity: float,
    report: Progress,
) -> None:
    """Fill the table `bands` with the band keys of every example that has enough shingles."""
    connection.execute("create table bands (place bigint, key ubigint)")
    num_bands, width = band_shape(similarity - TEMPLATE_ALLOWANCE)
    start = 0
    for words in store.batches(_BATCH_ROWS):
        report("sketch", start, store.num_examples)
        sets = _rare(counts, joined(words))
        rows = np.flatnonzero(sets.sizes >= MIN_SHINGLES)
        if len(rows):
            keys = _band_keys(signatures(_only(sets, rows), num_bands * width), num_bands)
            places = np.tile(start + rows, num_bands)
            insert_table(connection, "bands", pa.table({"place": places, "key": keys.ravel()}))
        start += len(sets.sizes)


def _only(sets: ShingleSets, rows: IndexArray) -> ShingleSets:
    """The sets of ``rows``."""
    is_kept = np.zeros(len(sets.sizes), dtype=np.bool_)
    is_kept[rows] = True
    hashes = sets.hashes[np.repeat(is_kept, sets.sizes)]
    return ShingleSets(hashes, np.concatenate([[0], np.cumsum(sets.sizes[rows])]))


def _band_keys(least: npt.NDArray[np.uint32], num_bands: int) -> HashArray:
    """Shape (num_bands, N). One hash over each band of the signatures, apart for each band."""
    bands = least.reshape(num_bands, -1, least.shape[1]).astype(np.uint64)
    keys = np.repeat(np.arange(1, num_bands + 1, dtype=np.uint64)[:, None], least.shape[1], axis=1)
    for place in range(bands.shape[1]):
        keys = mixed(keys * np.uint64(_BAND_BASE) + bands[:, place])
    return keys


def _verified(
    store: WordStore, counts: PhraseCounts, pairs: IndexArray, similarity: float
) -> SimilarPairs:
    """The pairs whose prompts are alike."""
    rows, places = np.unique(pairs, return_inverse=True)
    first, second = places.reshape(-1, 2).T
    words = store.take(rows)
    texts = joined(words)
    sides = _Sets.of(counts, words)
    prompts = sides.similarities(2 * first, 2 * second)
    alike = np.flatnonzero(prompts >= similarity)
    is_other = [has_other_passage(texts.of(first[at]), texts.of(second[at])) for at in alike]
    alike = alike[~np.asarray(is_other, dtype=np.bool_)]
    first, second = first[alike], second[alike]
    responses = sides.similarities(2 * first + 1, 2 * second + 1)
    whole = _Sets.of(counts, texts).similarities(first, second)
    same_answer = np.minimum(responses, whole) >= similarity
    return SimilarPairs(pairs[alike, 0], pairs[alike, 1], prompts[alike], whole, same_answer)


def _rare(counts: PhraseCounts, words: Words) -> ShingleSets:
    """The shingles of each text that are no template's."""
    return counts.without_common(word_shingles(words, SHINGLE_WORDS), STOCK_EXAMPLES)


@dataclass(frozen=True)
class _Sets:
    """All shingles of some texts, those that are no template's, and a digest of all words."""

    every: ShingleSets
    rare: ShingleSets
    digests: HashArray

    @classmethod
    def of(cls, counts: PhraseCounts, words: Words) -> "_Sets":
        every = word_shingles(words, SHINGLE_WORDS)
        return cls(every, counts.without_common(every, STOCK_EXAMPLES), text_digests(words))

    def similarities(self, first: IndexArray, second: IndexArray) -> FloatArray:
        """Shape (P,). By shingles where both have enough of them; else 1 for the same words."""
        has_enough = np.minimum(self.rare.sizes[first], self.rare.sizes[second]) >= MIN_SHINGLES
        without_templates = _jaccard(self.rare, first, second) + TEMPLATE_ALLOWANCE
        near = np.minimum(_jaccard(self.every, first, second), without_templates)
        return np.where(has_enough, near, self.digests[first] == self.digests[second])


def has_other_passage(first: HashArray, second: HashArray) -> bool:
    """Whether each of two texts has a passage in place of one of the other's.

    That is what another question about the same long text looks like: more than 3 of 10 words in a
    row are others, in both texts. Changes scattered over a text, or a passage added to one of them,
    are none. Texts of more than 4,000 words are not looked through: the answer is no.

    Args:
        first: Shape (W,), W >= 1. Words of one text.
        second: Shape (V,), V >= 1. Words of the other.
    """
    if max(len(first), len(second)) > _MAX_ALIGNED_WORDS:
        return False
    changed = [np.zeros(len(first)), np.zeros(len(second))]
    aligned = SequenceMatcher(None, first.tolist(), second.tolist(), autojunk=False)
    for kind, start, end, other_start, other_end in aligned.get_opcodes():
        if kind != "equal":
            changed[0][start:end] = 1
            changed[1][other_start:other_end] = 1
    window = np.ones(_WINDOW_WORDS)
    most = [float(np.convolve(text, window).max()) for text in changed]
    return min(most) > _MAX_CHANGED


def _jaccard(sets: ShingleSets, first: IndexArray, second: IndexArray) -> FloatArray:
    """Shape (P,). Shared shingles among all shingles of both; 0 for two empty sets."""
    shared = shared_sizes(sets, first, second)
    either = sets.sizes[first] + sets.sizes[second] - shared
    return np.asarray(shared / np.maximum(either, 1), dtype=np.float64)
