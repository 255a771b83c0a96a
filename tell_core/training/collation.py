"""Collation: rows of encoded examples to micro-batches with their label mask.

Padding stands on the right, so causal attention hides it from every real token and positions
count from 0 as they should: neither an attention mask nor position ids are passed, which keeps
the attention kernels on their fast causal path. Packed, the examples follow one another in one
sequence; positions begin anew with each, and attention is told where each ends.

Shape letters: R rows, L longest row in tokens (packed: 1 row of all tokens), S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.errors import DataError

FloatArray = npt.NDArray[np.float64]

PADDING_ID = 0
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass.

    Attributes:
        rows: Shape (E,). Indices into the encoded examples, in the order of the batch.
        input_ids_RL: int64. Token ids, padded on the right; packed: one row of them all.
        positions_S: int64. Flat positions ``row * L + t`` whose output predicts a supervised
            token, that is the position before it.
        targets_S: int64. The supervised tokens.
        batch_rows_S: int64. Index into ``rows`` of each supervised token; always on the CPU.
        num_tokens: Tokens without padding.
        segment_lengths: Packed: tokens of each example, in the order of ``rows``; else None.
        position_ids_RL: Packed: int64, position of each token in its own example; else None.
    """

    rows: IntArray
    input_ids_RL: torch.Tensor
    positions_S: torch.Tensor
    targets_S: torch.Tensor
    batch_rows_S: torch.Tensor
    num_tokens: int
    segment_lengths: tuple[int, ...] | None = None
    position_ids_RL: torch.Tensor | None = None

    @property
    def num_padded_tokens(self) -> int:
        """Tokens with padding."""
        return self.input_ids_RL.numel()

    def sum_by_row(self, values_S: FloatArray) -> FloatArray:
        """Sums of per-token values over each example, shape (E,)."""
        rows_S = self.batch_rows_S.numpy()
        sums = np.bincount(rows_S, weights=values_S, minlength=len(self.rows))
        return sums.astype(np.float64, copy=False)


def check_examples(examples: EncodedExamples, *, vocab_size: int, max_tokens: int | None) -> None:
    """Refuse examples that cannot be trained on, before anything is trained.

    Args:
        examples: Examples of the mixture or of the probe set.
        vocab_size: Tokens that the model has embeddings for.
        max_tokens: Longest sequence that the model takes; None when it has no limit.

    Raises:
        DataError: Examples without a supervised token, without a token before the first
            supervised one, with a token id beyond the vocabulary, or longer than the model takes.
    """
    starts, lengths = examples.response_starts, examples.lengths
    _refuse(np.flatnonzero(starts >= lengths), "have no supervised token; remove them")
    _refuse(np.flatnonzero(starts < 1), "begin with a supervised token; it has nothing before it")
    if max_tokens is not None:
        longer = np.flatnonzero(lengths > max_tokens)
        _refuse(
            longer, f"exceed the {max_tokens} tokens the model takes; lower curation.max_tokens"
        )
    if len(examples.tokens) and int(examples.tokens.max()) >= vocab_size:
        raise DataError(
            f"token id {int(examples.tokens.max())} is beyond the model's vocabulary of"
            f" {vocab_size}; the examples were encoded with the tokenizer of another model"
        )


def _refuse(rows: IntArray, what: str) -> None:
    if len(rows):
        shown = ", ".join(str(row) for row in rows[:_SHOWN_ROWS])
        more = ", ..." if len(rows) > _SHOWN_ROWS else ""
        raise DataError(f"{len(rows)} encoded examples (rows {shown}{more}) {what}")


def collate(
    examples: EncodedExamples, rows: IntArray | Sequence[int], device: torch.device
) -> MicroBatch:
    """Pad the examples at ``rows`` to the longest of them and lay out the label mask."""
    rows = np.asarray(rows, dtype=np.int64)
    lengths, starts = examples.lengths[rows], examples.response_starts[rows].astype(np.int64)
    longest = int(lengths.max())
    row_T, column_T = _ragged_index(lengths)
    input_ids = np.full((len(rows), longest), PADDING_ID, dtype=np.int64)
    input_ids[row_T, column_T] = examples.tokens[examples.offsets[rows][row_T] + column_T]
    row_S, shift_S = _ragged_index(lengths - starts)
    column_S = starts[row_S] + shift_S
    return MicroBatch(
        rows=rows,
        input_ids_RL=torch.from_numpy(input_ids).to(device),
        positions_S=torch.from_numpy(row_S * longest + column_S - 1).to(device),
        targets_S=torch.from_numpy(input_ids[row_S, column_S]).to(device),
        batch_rows_S=torch.from_numpy(row_S),
        num_tokens=int(lengths.sum()),
    )


def pack(
    examples: EncodedExamples, rows: IntArray | Sequence[int], device: torch.device
) -> MicroBatch:
    """Put the examples at ``rows`` one after another into one sequence, and lay out the mask."""
    rows = np.asarray(rows, dtype=np.int64)
    lengths, starts = examples.lengths[rows], examples.response_starts[rows].astype(np.int64)
    row_T, position_T = _ragged_index(lengths)
    input_ids_T = examples.tokens[examples.offsets[rows][row_T] + position_T].astype(np.int64)
    row_S, shift_S = _ragged_index(lengths - starts)
    position_S = (np.cumsum(lengths) - lengths + starts)[row_S] + shift_S
    return MicroBatch(
        rows=rows,
        input_ids_RL=torch.from_numpy(input_ids_T[None]).to(device),
        positions_S=torch.from_numpy(position_S - 1).to(device),
        targets_S=torch.from_numpy(input_ids_T[position_S]).to(device),
        batch_rows_S=torch.from_numpy(row_S),
        num_tokens=len(input_ids_T),
        segment_lengths=tuple(lengths.tolist()),
        position_ids_RL=torch.from_numpy(position_T[None]).to(device),
    )


def _ragged_index(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Row and column of every element of rows of the given lengths, row after row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return rows, np.arange(len(rows)) - np.repeat(ends - counts, counts)
