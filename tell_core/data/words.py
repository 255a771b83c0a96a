"""Words: texts as sequences of hashed words, computed once and kept on disk.

Words are runs of letters, marks and digits with case folded (Unicode NFKC); scripts written without
spaces give a word per character. Everything is arithmetic modulo 2^64 over arrays, so it costs a
fraction of hashing word by word in Python, and equal texts give equal hashes on every machine.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HashArray = npt.NDArray[np.uint64]
IndexArray = npt.NDArray[np.int64]

_CODE_POINTS = 0x110000
_SEPARATOR, _LETTER, _LONE = 0, 1, 2
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, extensions B and later
)
_LETTER_BASE = 0x9E3779B97F4A7C15
_HASH_BYTES = 8


@dataclass(frozen=True)
class Words:
    """The words of several texts, as hashes.

    Attributes:
        hashes: Shape (W,), uint64. All words, text after text.
        offsets: Shape (N + 1,). Where each text's words begin, and the end.
    """

    hashes: HashArray
    offsets: IndexArray

    @property
    def num_texts(self) -> int:
        """Texts, those without words included."""
        return len(self.offsets) - 1

    def of(self, text: int) -> HashArray:
        """The words of one text."""
        return self.hashes[self.offsets[text] : self.offsets[text + 1]]

    def first_of_each_pair(self) -> "Words":
        """The words of the first, third, fifth, ... text."""
        return self.only(np.arange(0, self.num_texts, 2))

    def second_of_each_pair(self) -> "Words":
        """The words of the second, fourth, sixth, ... text."""
        return self.only(np.arange(1, self.num_texts, 2))

    def only(self, texts: IndexArray) -> "Words":
        """The words of some texts, whose numbers rise."""
        sizes = np.diff(self.offsets)
        is_kept = np.zeros(self.num_texts, dtype=np.bool_)
        is_kept[texts] = True
        offsets = np.concatenate([[0], np.cumsum(sizes[texts])]).astype(np.int64)
        return Words(self.hashes[np.repeat(is_kept, sizes)], offsets)

    def texts(self, start: int, stop: int) -> "Words":
        """The words of texts ``start`` to ``stop``, the last left out."""
        offsets = self.offsets[start : stop + 1]
        return Words(self.hashes[offsets[0] : offsets[-1]], offsets - offsets[0])


class WordStore:
    """The words of prompts and responses, hashed once; the hashes lie on disk.

    Args:
        path: File for the hashes, made anew.
    """

    def __init__(self, path: Path):
        self._path = path
        self._offsets: list[IndexArray] = [np.zeros(1, dtype=np.int64)]
        path.write_bytes(b"")

    def append(self, prompts: Sequence[str], responses: Sequence[str]) -> None:
        """Add examples; each becomes one row more."""
        texts = [text for pair in zip(prompts, responses, strict=True) for text in pair]
        words = hash_words(texts)
        with self._path.open("ab") as file:
            words.hashes.tofile(file)
        self._offsets.append(self._offsets[-1][-1] + words.offsets[1:])

    def seal(self) -> None:
        """Make what was added readable; nothing can be added afterwards."""
        self._offsets = [np.concatenate(self._offsets)]

    @property
    def num_words(self) -> int:
        """Words of all rows."""
        return int(self._offsets[0][-1])

    @property
    def num_examples(self) -> int:
        """Rows added."""
        return len(self._offsets[0]) // 2

    def _mapped(self) -> HashArray:
        """All hashes, mapped anew each time: pages looked at once do not stay in memory."""
        if not self.num_words:
            return np.empty(0, dtype=np.uint64)
        return np.memmap(self._path, dtype=np.uint64, mode="r")

    def batches(self, batch_rows: int) -> Iterator[Words]:
        """Words of all rows in order: prompt and response of each in turn."""
        for start in range(0, self.num_examples, batch_rows):
            stop = min(start + batch_rows, self.num_examples)
            offsets = self._offsets[0][2 * start : 2 * stop + 1]
            first, num_words = int(offsets[0]), int(offsets[-1] - offsets[0])
            hashes = np.fromfile(
                self._path, dtype=np.uint64, count=num_words, offset=first * _HASH_BYTES
            )
            yield Words(hashes, offsets - first)

    def take(self, rows: IndexArray) -> Words:
        """Words of ``rows``: prompt and response of each in turn."""
        offsets = self._offsets[0]
        starts, middles, ends = (offsets[2 * rows + place] for place in range(3))
        lengths = np.stack([middles - starts, ends - middles], axis=1).ravel()
        stored = self._mapped()
        parts = [stored[start:end] for start, end in zip(starts, ends, strict=True)]
        hashes = np.concatenate([np.empty(0, dtype=np.uint64), *parts])
        return Words(hashes, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def joined(words: Words) -> Words:
    """Each example's prompt and response as one text."""
    return Words(words.hashes, words.offsets[::2])


def text_digests(words: Words) -> HashArray:
    """Shape (N,). Equal for texts of the same words in the same order."""
    return _range_hashes(words.hashes, words.offsets[:-1], words.offsets[1:])


def hash_words(texts: Sequence[str]) -> Words:
    """The words of ``texts``: which they are and in what order, nothing between them."""
    normalised = [_normalised(text) for text in texts]
    joined = "\n".join(normalised) + "\n"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _kinds()[codes]
    before = np.concatenate([[_SEPARATOR], kinds[:-1]])
    after = np.concatenate([kinds[1:], [_SEPARATOR]])
    is_first = (kinds == _LONE) | ((kinds == _LETTER) & (before != _LETTER))
    is_last = (kinds == _LONE) | ((kinds == _LETTER) & (after != _LETTER))
    starts, ends = np.flatnonzero(is_first), np.flatnonzero(is_last) + 1
    text_ends = np.cumsum([len(text) + 1 for text in normalised])
    offsets = np.concatenate([[0], np.searchsorted(starts, text_ends)]).astype(np.int64)
    return Words(_range_hashes(_letter_hashes()[codes], starts, ends), offsets)


def mixed(values: HashArray) -> HashArray:
    """Spread the bits of 64-bit values: the finaliser of SplitMix64, a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _normalised(text: str) -> str:
    """Case folded, compatible characters made one; a line break never spans two texts."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _range_hashes(letters: HashArray, starts: IndexArray, ends: IndexArray) -> HashArray:
    """Polynomial hash of each range of ``letters``, from one running sum.

    With base b, the sum of letter[i] * b^i over a range, times b^-start, depends on the range's
    content alone; b is odd, so its inverse modulo 2^64 exists.
    """
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    powers = _powers(_LETTER_BASE, len(letters))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(letters * powers, dtype=np.uint64)])
    back = _powers(pow(_LETTER_BASE, -1, 1 << 64), len(letters) + 1)  # an empty range may end it
    return mixed((sums[ends] - sums[starts]) * back[starts])


def _powers(base: int, count: int) -> HashArray:
    """1, base, base^2, ... modulo 2^64."""
    size = 1 << max(count - 1, 1).bit_length()
    return _all_powers(base, size)[:count]


@lru_cache(maxsize=4)
def _all_powers(base: int, count: int) -> HashArray:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


@lru_cache(maxsize=1)
def _letter_hashes() -> HashArray:
    return mixed(np.arange(1, _CODE_POINTS + 1, dtype=np.uint64))


@lru_cache(maxsize=1)
def _kinds() -> npt.NDArray[np.uint8]:
    """For each code point: separator, part of a word, or a word by itself."""
    kinds = np.array(
        [unicodedata.category(chr(code))[0] in "LMN" for code in range(_CODE_POINTS)], np.uint8
    )
    for first, last in _WITHOUT_SPACES:
        kinds[first : last + 1] *= _LONE
    return kinds
