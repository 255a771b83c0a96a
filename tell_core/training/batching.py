"""Batching: how the examples of one optimiser step are laid out in forward passes.

A layout depends on lengths alone, so it is counted before anything is trained, and it never moves
an example to another step: which examples a step trains on is a matter of the stored order.

``padded`` keeps the stored order and fills shorter examples up to the longest of their forward
pass; ``length_grouped`` does so with examples of similar length, none to more than twice its own;
``packed`` puts examples one after another into one sequence, without padding and without attention
across them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tell_core.data.encoding import BoolArray, IntArray

Layout = Literal["padded", "length_grouped", "packed"]


@dataclass(frozen=True)
class Limits:
    """How a step is laid out, and what one forward pass may hold.

    Attributes:
        layout: See the module.
        max_examples: Most examples of a forward pass; None: no limit.
        max_tokens: Most tokens of a forward pass, padding included; None: no limit. An example
            longer than this has a forward pass of its own.
    """

    layout: Layout
    max_examples: int | None = None
    max_tokens: int | None = None

    def holds(self, num_examples: int, num_tokens: int) -> bool:
        """Whether a forward pass may be of this size."""
        is_few = self.max_examples is None or num_examples <= self.max_examples
        return is_few and (self.max_tokens is None or num_tokens <= self.max_tokens)

    def suits(self, length: int | IntArray, longest: int | IntArray) -> bool | BoolArray:
        """Whether an example may be padded to ``longest`` tokens.

        Grouped by length, to at most twice its own: however large a forward pass may be, less than
        half of it is padding.
        """
        return self.layout != "length_grouped" or 2 * length >= longest

    def num_tokens(self, lengths: IntArray) -> int:
        """Tokens, padding included, of one forward pass over examples of these lengths."""
        if self.layout == "packed":
            return int(lengths.sum())
        return int(lengths.max()) * len(lengths)


@dataclass(frozen=True)
class BatchCounts:
    """What a training will compute, exactly.

    Attributes:
        steps: Optimiser steps.
        forward_passes: Forward passes with gradient; in the packed layout the number of packs.
        tokens: Tokens without padding.
        padded_tokens: Tokens with padding.
    """

    steps: int
    forward_passes: int
    tokens: int
    padded_tokens: int

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that are padding."""
        return 1 - self.tokens / self.padded_tokens


def lay_out(lengths: IntArray, limits: Limits) -> list[IntArray]:
    """Split the examples of one step into forward passes.

    Grouped or packed, the longest come first, so that a lack of memory shows at once.

    Args:
        lengths: Shape (B,), B >= 1. Tokens of each example of the step.
        limits: The layout and the size of a forward pass.

    Returns:
        Indices into ``lengths``, a forward pass each; together they are a permutation.
    """
    if limits.layout == "packed":
        return _best_fit(lengths, limits)
    order = np.arange(len(lengths))
    if limits.layout == "length_grouped":
        order = np.argsort(-lengths, kind="stable")
    return _fill_in_order(lengths, order, limits)


def _fill_in_order(lengths: IntArray, order: IntArray, limits: Limits) -> list[IntArray]:
    """Start a new forward pass whenever the next example does not fit the present one."""
    passes: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        length = int(lengths[index])
        longest = max(longest, length)
        size = len(passes[-1]) + 1 if passes else 0
        if passes and limits.suits(length, longest) and limits.holds(size, longest * size):
            passes[-1].append(index)
        else:
            passes.append([index])
            longest = length
    return [np.asarray(indices, dtype=np.int64) for indices in passes]


def _best_fit(lengths: IntArray, limits: Limits) -> list[IntArray]:
    """Put each example, longest first, into the fullest pack that still has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest possible packs, plus one (Johnson 1974).
    """
    if limits.holds(len(lengths), int(lengths.sum())):
        return [np.argsort(-lengths, kind="stable")]
    capacity = limits.max_tokens or int(lengths.sum())
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of each pack that is not full
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        found = bisect_left(room, (length, 0))
        if found == len(room):
            packs.append([])
            left, number = capacity, len(packs) - 1
        else:
            left, number = room.pop(found)
        packs[number].append(index)
        if left > length and len(packs[number]) != limits.max_examples:
            insort(room, (left - length, number))
    return [np.asarray(indices, dtype=np.int64) for indices in packs]


def count_batches(
    lengths: IntArray, order: IntArray, batch_size: int, limits: Limits, num_ranks: int = 1
) -> BatchCounts:
    """Count the forward passes of a whole training.

    Steps that are one forward pass are counted together; only the others are laid out.

    Args:
        lengths: Shape (N,). Tokens of each distinct example.
        order: Shape (M,), M >= 1. Index of the example at each position of the training.
        batch_size: Examples of an optimiser step; the last step may have fewer.
        limits: The layout and the size of a forward pass.
        num_ranks: Ranks that share each step; every one lays out its own share.
    """
    of_positions = lengths[order].astype(np.int64)
    starts = np.arange(0, len(order), batch_size)
    tokens = np.add.reduceat(of_positions, starts)
    computed = tokens
    if limits.layout != "packed":
        examples = np.diff(np.append(starts, len(order)))
        longest = np.maximum.reduceat(of_positions, starts)
        computed = longest * examples
    is_one_pass = np.zeros(len(starts), dtype=np.bool_)
    if num_ranks == 1 and limits.holds(batch_size, 0):
        is_one_pass = computed <= (limits.max_tokens or computed.max())
    if limits.layout == "length_grouped":
        is_one_pass &= limits.suits(np.minimum.reduceat(of_positions, starts), longest)
    forward_passes, padded_tokens = int(is_one_pass.sum()), int(computed[is_one_pass].sum())
    for start in starts[~is_one_pass]:
        for part in _shares_laid_out(of_positions[start : start + batch_size], limits, num_ranks):
            forward_passes += 1
            padded_tokens += limits.num_tokens(part)
    return BatchCounts(len(starts), forward_passes, int(tokens.sum()), padded_tokens)


def needs_no_layout(lengths: IntArray, batch_size: int, limits: Limits, num_ranks: int) -> bool:
    """Whether any examples of these lengths (N,) make a step of one pack, whatever their order."""
    fits = limits.holds(batch_size, batch_size * int(lengths.max()))
    return limits.layout == "packed" and num_ranks == 1 and fits


def _shares_laid_out(lengths: IntArray, limits: Limits, num_ranks: int) -> Iterator[IntArray]:
    """Lengths of the examples of each forward pass of a step, rank after rank."""
    shares = share_rows(lengths, num_ranks) if num_ranks > 1 else [np.arange(len(lengths))]
    for share in shares:
        if len(share):
            yield from (lengths[share][part] for part in lay_out(lengths[share], limits))


def tighter(limits: Limits, lengths: IntArray) -> Limits | None:
    """Limits under which the largest forward pass of this step is about half as large.

    Args:
        limits: Those under which memory ran out.
        lengths: Shape (B,). Tokens of each example of the step.

    Returns:
        None when every example has a forward pass of its own already.
    """
    passes = lay_out(lengths, limits)
    shared = [part for part in passes if len(part) > 1]
    if not shared:
        return None
    largest = max(limits.num_tokens(lengths[part]) for part in shared)
    return replace(limits, max_tokens=max(largest // 2, 1))


def share_rows(lengths: IntArray, num_shares: int) -> list[IntArray]:
    """Divide the examples of a step among ranks so that their tokens are about equal.

    Args:
        lengths: Shape (B,). Tokens of each example of the step.
        num_shares: Number of ranks; with fewer examples than ranks some get none.

    Returns:
        Indices into ``lengths``, rising, one array for each rank; together a permutation.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for index in np.argsort(-lengths, kind="stable").tolist():
        least = tokens.index(min(tokens))
        shares[least].append(index)
        tokens[least] += int(lengths[index])
    return [np.asarray(sorted(share), dtype=np.int64) for share in shares]
