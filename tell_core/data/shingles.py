"""Shingles: texts as sets of hashed runs of words, whole batches at a time."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tell_core.data.words import HashArray, IndexArray, Words, mixed

_WORD_BASE = 0xD6E8FEB86659FD93
_MIN_SLOT_BITS, _MAX_SLOT_BITS = 16, 26
HASH_BITS = 53
"""Bits of a shingle's hash; the other 11 hold the place of its text in a batch while sorting."""
_BLOCK_TEXTS = 1 << (64 - HASH_BITS)


@dataclass(frozen=True)
class ShingleSets:
    """The distinct shingles of several texts.

    Attributes:
        hashes: Shape (S,), uint64, below 2^53. Rising within each text.
        offsets: Shape (N + 1,). Where each text's shingles begin, and the end.
    """

    hashes: HashArray
    offsets: IndexArray

    @property
    def sizes(self) -> IndexArray:
        """Shape (N,). Distinct shingles of each text."""
        return np.diff(self.offsets)


def word_shingles(words: Words, size: int) -> ShingleSets:
    """The distinct runs of ``size`` words of each text; none of a text with fewer words."""
    blocks = [
        _block_shingles(words.texts(start, start + _BLOCK_TEXTS), size)
        for start in range(0, words.num_texts, _BLOCK_TEXTS)
    ]
    sizes = np.concatenate([np.zeros(1, np.int64), *(block.sizes for block in blocks)])
    hashes = [np.empty(0, dtype=np.uint64), *(block.hashes for block in blocks)]
    return ShingleSets(np.concatenate(hashes), np.cumsum(sizes))


def run_hashes(words: Words, size: int) -> HashArray:
    """Shape (max(W - size + 1, 0),). Every run of ``size`` words, across texts too, in order."""
    num_runs = max(len(words.hashes) - size + 1, 0)
    runs = np.zeros(num_runs, dtype=np.uint64)
    for place in range(size):
        runs = runs * np.uint64(_WORD_BASE) + words.hashes[place : place + num_runs]
    return mixed(runs) >> np.uint64(64 - HASH_BITS)


def _block_shingles(words: Words, size: int) -> ShingleSets:
    rows = np.repeat(np.arange(words.num_texts), np.diff(words.offsets))
    runs = run_hashes(words, size)
    is_whole = rows[: len(runs)] == rows[size - 1 : size - 1 + len(runs)]
    return _distinct(rows[: len(runs)][is_whole], runs[is_whole], words.num_texts)


class PhraseCounts:
    """In how many texts each shingle stands, in bounded memory.

    Shingles that share a slot are counted together, so a count is never too low.

    Args:
        num_shingles: About how many there are in all.
    """

    def __init__(self, num_shingles: int):
        bits = min(max((2 * num_shingles).bit_length(), _MIN_SLOT_BITS), _MAX_SLOT_BITS)
        self._shift = np.uint64(HASH_BITS - bits)
        self._counts = np.zeros(1 << bits, dtype=np.uint32)

    def add(self, sets: ShingleSets) -> None:
        """Count the shingles of further texts."""
        np.add.at(self._counts, sets.hashes >> self._shift, np.uint32(1))

    def is_rare(self, hashes: HashArray, max_texts: int) -> npt.NDArray[np.bool_]:
        """Shape of ``hashes``. Which shingles stand in at most ``max_texts`` texts."""
        return np.asarray(self._counts[hashes >> self._shift] <= max_texts)

    def without_common(self, sets: ShingleSets, max_texts: int) -> ShingleSets:
        """The sets without the shingles that stand in more than ``max_texts`` texts."""
        is_rare = self.is_rare(sets.hashes, max_texts)
        kept_before = np.concatenate([[0], np.cumsum(is_rare)])
        return ShingleSets(sets.hashes[is_rare], kept_before[sets.offsets])


def shared_sizes(sets: ShingleSets, first: IndexArray, second: IndexArray) -> IndexArray:
    """Shape (P,). How many shingles the sets of each pair have in common.

    Args:
        sets: The sets.
        first: Shape (P,). One set of each pair.
        second: Shape (P,). The other.
    """
    sizes = [0]
    for start in range(0, len(first), _BLOCK_TEXTS):
        chosen = (first[start : start + _BLOCK_TEXTS], second[start : start + _BLOCK_TEXTS])
        num_pairs = len(chosen[0])
        packed = np.concatenate([_packed(sets, texts) for texts in chosen])
        packed.sort()
        twice = packed[1:][packed[1:] == packed[:-1]] >> np.uint64(HASH_BITS)
        sizes.extend(np.bincount(twice.astype(np.int64), minlength=num_pairs).tolist())
    return np.asarray(sizes[1:], dtype=np.int64)


def _packed(sets: ShingleSets, texts: IndexArray) -> HashArray:
    """The shingles of ``texts``, each marked with the place of its text."""
    lengths = sets.sizes[texts]
    starts = sets.offsets[texts]
    places = np.repeat(np.arange(len(texts)), lengths)
    within = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    hashes = sets.hashes[starts[places] + within]
    marks = places.astype(np.uint64) << np.uint64(HASH_BITS)
    return np.asarray(hashes | marks, dtype=np.uint64)


def _distinct(rows: IndexArray, hashes: HashArray, num_texts: int) -> ShingleSets:
    """Sort each text's hashes and drop repeats, by one sort of (row, hash) packed in 64 bits."""
    packed = (rows.astype(np.uint64) << np.uint64(HASH_BITS)) | hashes
    packed.sort()
    if len(packed):
        packed = packed[np.concatenate([[True], packed[1:] != packed[:-1]])]
    edges = np.arange(num_texts + 1, dtype=object) << HASH_BITS
    offsets = np.searchsorted(packed, np.array(edges[:-1], dtype=np.uint64))
    offsets = np.concatenate([offsets, [len(packed)]]).astype(np.int64)
    return ShingleSets(packed & np.uint64((1 << HASH_BITS) - 1), offsets)
