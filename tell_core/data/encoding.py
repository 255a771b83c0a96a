"""Encoded examples and mixtures: flat token arrays that training reads, and nothing else.

Shape letters: N examples, T tokens in all, M positions of a whole training.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of N examples in one flat array.

    Attributes:
        tokens: Shape (T,), int32. Token ids, examples one after another.
        offsets: Shape (N + 1,), int64. Example i is ``tokens[offsets[i]:offsets[i + 1]]``.
        response_starts: Shape (N,), int32. Position inside the example of its first supervised
            token; every token from there on is supervised, none before.
        is_task: Shape (N,), bool. True for task data, False for general data.
    """

    tokens: IntArray
    offsets: IntArray
    response_starts: IntArray
    is_task: BoolArray

    def __len__(self) -> int:
        return len(self.response_starts)

    def example(self, index: int) -> IntArray:
        """Token ids of one example, shape (L,)."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def lengths(self) -> IntArray:
        """Shape (N,). Tokens per example."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return int(self.offsets[-1])

    @cached_property
    def supervised_counts(self) -> IntArray:
        """Shape (N,). Supervised tokens per example."""
        return np.asarray(self.lengths - self.response_starts)

    @property
    def num_supervised_tokens(self) -> int:
        """Supervised tokens in all."""
        return int(self.supervised_counts.sum())

    def select(self, rows: Sequence[int] | IntArray) -> "EncodedExamples":
        """The examples at ``rows``, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[index]
        return EncodedExamples(
            tokens=self.tokens[_ranges(self.offsets[:-1][index], lengths)],
            offsets=_offsets(lengths),
            response_starts=self.response_starts[index],
            is_task=self.is_task[index],
        )

    def save(self, path: Path) -> None:
        """Write the four arrays as safetensors."""
        save_file(_contiguous(self), path)

    @classmethod
    def load(cls, path: Path) -> "EncodedExamples":
        """Read what `save` wrote."""
        arrays = load_file(path)
        return cls(**{name: arrays[name] for name in _FIELDS})


_FIELDS = ("tokens", "offsets", "response_starts", "is_task")


@dataclass(frozen=True)
class Mixture:
    """Examples and the order in which a whole training meets them.

    Attributes:
        examples: The distinct examples.
        order: Shape (M,), int32. Index of the example at each position, all epochs in
            sequence. Optimiser step s trains on ``order[s * B:(s + 1) * B]`` for batch size B;
            the last step may be short.
    """

    examples: EncodedExamples
    order: IntArray

    def num_steps(self, batch_size: int) -> int:
        """Optimiser steps of the whole training."""
        return -(-len(self.order) // batch_size)

    @cached_property
    def digest(self) -> str:
        """sha256 over all arrays, in hexadecimal."""
        digest = hashlib.sha256()
        for name, array in sorted((_contiguous(self.examples) | {"order": self.order}).items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write examples and order as safetensors."""
        save_file(_contiguous(self.examples) | {"order": self.order.astype(np.int32)}, path)

    @classmethod
    def load(cls, path: Path) -> "Mixture":
        """Read what `save` wrote."""
        arrays = load_file(path)
        examples = EncodedExamples(**{name: arrays[name] for name in _FIELDS})
        return cls(examples, arrays["order"])


def from_lists(
    examples: Sequence[tuple[Sequence[int] | IntArray, int]], is_task: bool
) -> EncodedExamples:
    """Flatten ``(token ids, response start)`` pairs, all of one role."""
    ids = [np.asarray(tokens, dtype=np.int32) for tokens, _ in examples]
    return EncodedExamples(
        tokens=np.concatenate(ids) if ids else np.empty(0, np.int32),
        offsets=_offsets([len(tokens) for tokens in ids]),
        response_starts=np.asarray([start for _, start in examples], dtype=np.int32),
        is_task=np.full(len(ids), is_task, dtype=np.bool_),
    )


def concatenate(parts: Sequence[EncodedExamples]) -> EncodedExamples:
    """One collection after another."""
    return EncodedExamples(
        tokens=np.concatenate([part.tokens for part in parts]).astype(np.int32),
        offsets=_offsets(np.concatenate([part.lengths for part in parts])),
        response_starts=np.concatenate([part.response_starts for part in parts]).astype(np.int32),
        is_task=np.concatenate([part.is_task for part in parts]),
    )


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """The places ``start`` to ``start + length - 1`` of each range, one range after another."""
    ends = np.cumsum(lengths)
    num_places = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(num_places)


def _offsets(lengths: Sequence[int] | IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _contiguous(examples: EncodedExamples) -> dict[str, npt.NDArray[np.generic]]:
    dtypes = {"tokens": np.int32, "offsets": np.int64, "response_starts": np.int32}
    return {
        name: np.ascontiguousarray(getattr(examples, name), dtype=dtypes.get(name, np.bool_))
        for name in _FIELDS
    }
