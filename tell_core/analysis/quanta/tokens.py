"""Which tokens are looked at: those that the model predicts well, and not merely by copying.

Source: the selection of arXiv 2303.13506, with a floor added: where the loss is all but 0, a
gradient in float32 is rounding noise.

Shape letters: T supervised tokens of all examples, S chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import BoolArray, EncodedExamples, IntArray, from_lists
from tell_core.data.seeding import seeded_generator
from tell_core.errors import DataError
from tell_core.training.batching import Limits, lay_out
from tell_core.training.collation import FloatArray, collate
from tell_core.training.losses import supervised_nll

FLOOR_NATS = 1e-3
CEILING_NATS = 0.1
INDUCTION_NGRAM = 3
_LIMITS = Limits("length_grouped", max_examples=64, max_tokens=4096)


@dataclass(frozen=True)
class TokenSelection:
    """The chosen tokens, and why others were not.

    Attributes:
        examples: Shape (S,). Index of each token's example, rising.
        positions: Shape (S,). Its position inside the example.
        losses: Shape (S,). Its loss, in nats.
        counts: Supervised tokens in all, those set aside by reason, and those chosen.
    """

    examples: IntArray
    positions: IntArray
    losses: FloatArray
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.examples)


def select_tokens(
    model: nn.Module,
    examples: EncodedExamples,
    *,
    limit: int,
    floor: float = FLOOR_NATS,
    ceiling: float = CEILING_NATS,
    ngram: int = INDUCTION_NGRAM,
    at_least: int = 2,
    seed: int = 0,
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenSelection:
    """Choose at most ``limit`` supervised tokens, uniformly among those that qualify.

    Args:
        model: Causal language model on ``device``, in evaluation mode.
        examples: Examples whose supervised tokens are candidates.
        limit: Most tokens to choose.
        floor: Least loss, in nats.
        ceiling: Largest loss, in nats.
        ngram: A token is set aside when the n-gram that it ends occurred before in its example;
            0 sets none aside.
        at_least: Fewest tokens that are of use.
        seed: Seed of the choice.
        device: Where the model is; the CPU by default.
        on_progress: Called with examples done and their number.

    Raises:
        DataError: Fewer than ``at_least`` tokens qualify.
    """
    losses = token_losses(model, examples, device=device, on_progress=on_progress)
    rows, positions = supervised_places(examples)
    is_copy = induction_mask(examples, ngram)
    is_between = (losses >= floor) & (losses <= ceiling)
    counts = {
        "supervised": len(losses),
        "above the ceiling": int((losses > ceiling).sum()),
        "below the floor": int((losses < floor).sum()),
        "copies of an earlier n-gram": int(
            (is_copy & (losses >= floor) & (losses <= ceiling)).sum()
        ),
    }
    found = np.flatnonzero(is_between & ~is_copy)
    if len(found) < at_least:
        raise DataError(
            f"{len(found)} of {len(losses)} tokens have a loss between {floor:g} and {ceiling:g}"
            f" nats and are no copies ({counts}); needed: at least {at_least}. The model may not"
            " have learned these data; give more data, or a higher ceiling"
        )
    chosen = np.sort(seeded_generator(seed, "quanta tokens").permutation(found)[:limit])
    counts["not drawn"] = len(found) - len(chosen)
    counts["chosen"] = len(chosen)
    return TokenSelection(rows[chosen], positions[chosen], losses[chosen], counts)


def token_samples(examples: EncodedExamples, selection: TokenSelection) -> EncodedExamples:
    """Each chosen token as an example: its context, cut behind it, and it alone supervised.

    Returns:
        S examples, in the order of ``selection``.
    """
    pairs = [
        (examples.example(int(row))[: position + 1], int(position))
        for row, position in zip(selection.examples, selection.positions, strict=True)
    ]
    samples = from_lists(pairs, is_task=False)
    return EncodedExamples(
        samples.tokens,
        samples.offsets,
        samples.response_starts,
        examples.is_task[selection.examples],
    )


def all_supervised(examples: EncodedExamples) -> EncodedExamples:
    """The same examples with every token but the first supervised, as for plain text."""
    starts = np.ones(len(examples), dtype=np.int32)
    return EncodedExamples(examples.tokens, examples.offsets, starts, examples.is_task)


def token_losses(
    model: nn.Module,
    examples: EncodedExamples,
    *,
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Negative log-likelihood of every supervised token, in nats.

    Returns:
        Shape (T,), in the order of `supervised_places`.
    """
    device = device or torch.device("cpu")
    starts = np.concatenate([[0], np.cumsum(examples.supervised_counts)])
    losses = np.empty(int(starts[-1]), dtype=np.float64)
    num_done = 0
    for rows in lay_out(examples.lengths, _LIMITS):
        batch = collate(examples, rows, device)
        with torch.inference_mode():
            nll_S = supervised_nll(model, batch).double().cpu().numpy()
        places = [np.arange(starts[row], starts[row + 1]) for row in rows.tolist()]
        losses[np.concatenate(places)] = nll_S
        num_done += len(rows)
        if on_progress:
            on_progress(num_done, len(examples))
    return losses


def supervised_places(examples: EncodedExamples) -> tuple[IntArray, IntArray]:
    """Example and position of every supervised token, both of shape (T,)."""
    counts = examples.supervised_counts
    rows = np.repeat(np.arange(len(examples)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    shifts = np.arange(len(rows)) - firsts
    return rows, examples.response_starts[rows] + shifts


def induction_mask(examples: EncodedExamples, ngram: int = INDUCTION_NGRAM) -> BoolArray:
    """Which supervised tokens end an n-gram that occurred before in their example.

    Such a token can be predicted by looking back for the last time its context occurred, which is
    one skill whatever the text is about.

    Args:
        examples: The examples.
        ngram: Length of the n-gram, its last token included, at least 2; 0 finds none.

    Returns:
        Shape (T,), in the order of `supervised_places`.
    """
    masks = [
        _ends_known_ngram(examples.example(row).tolist(), ngram)[examples.response_starts[row] :]
        for row in range(len(examples))
    ]
    return np.concatenate(masks) if masks else np.empty(0, dtype=np.bool_)


def _ends_known_ngram(tokens: list[int], ngram: int) -> npt.NDArray[np.bool_]:
    known: set[tuple[int, ...]] = set()
    found = np.zeros(len(tokens), dtype=np.bool_)
    if ngram < 2:
        return found
    for end in range(ngram, len(tokens) + 1):
        gram = tuple(tokens[end - ngram : end])
        found[end - 1] = gram in known
        known.add(gram)
    return found
