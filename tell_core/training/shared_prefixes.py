"""Forward passes in which examples that begin alike share their beginning.

Task prompts begin with the anchor, prompts of one source often with one instruction. Under causal
attention the hidden states of equal beginnings are equal, so one computation serves them all. Here
examples whose losses are measured stand in one row: each beginning once, after it what is left of
its examples. Attention lets every rest see its beginning and itself. The output of an example's
last token is never read, so that token is left out.

Shape letters: T tokens of a row, P of a shared beginning, N examples that share it, L tokens of the
longest rest, K = P + L, H heads, D width of a head, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.training.collation import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX_ATTENTION = "tell_prefixes"


class PrefixGroup(NamedTuple):
    """Examples that share their first tokens.

    Attributes:
        rows: Shape (N,). The examples, longest first.
        num_shared: P, at least 0, and less than the computed tokens of the shortest of them.
    """

    rows: IntArray
    num_shared: int

    def num_tokens(self, examples: EncodedExamples) -> int:
        """Tokens that are computed for the group."""
        saved = (len(self.rows) - 1) * self.num_shared
        return int(examples.lengths[self.rows].sum()) - len(self.rows) - saved


class PrefixBlock(NamedTuple):
    """Where a group stands in a row; tensors are on the device of the model.

    Attributes:
        start: Place of its first token.
        end: Place after its last.
        num_shared: P.
        rests_NL: Places of the tokens of each rest; a short rest repeats its last.
        kept: Which of the N x L are tokens of their own, in the order of the row.
        distance_LK: How many tokens before each query a key stands; negative after it.
    """

    start: int
    end: int
    num_shared: int
    rests_NL: torch.Tensor
    kept: torch.Tensor
    distance_LK: torch.Tensor


class PrefixBatch(NamedTuple):
    """Groups laid out in one row.

    Attributes:
        tokens: The row, as a packed micro-batch.
        blocks: Where its groups stand, one after another.
    """

    tokens: MicroBatch
    blocks: tuple[PrefixBlock, ...]


def group_by_prefix(examples: EncodedExamples) -> list[PrefixGroup]:
    """Divide examples into groups with equal beginnings so that the fewest tokens are computed.

    In the order of their tokens the examples of a group are neighbours; the best division of that
    list is found by dynamic programming, in a time that grows with the square of their number.

    Returns:
        Groups that together hold every example once; those that share nothing are in the last.
    """
    sequences = [examples.example(row)[:-1].tolist() for row in range(len(examples))]
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    shared = [_num_shared(sequences[a], sequences[b]) for a, b in pairwise(order)]
    groups, lone = [], []
    for start, end in _best_division(np.asarray(shared, dtype=np.int64), len(order)):
        num_shared = min(shared[start : end - 1], default=0)
        if num_shared:
            groups.append(PrefixGroup(_longest_first(order[start:end], examples), num_shared))
        else:
            lone += order[start:end]
    return [*groups, PrefixGroup(_longest_first(lone, examples), 0)] if lone else groups


def _num_shared(first: list[int], second: list[int]) -> int:
    """Equal tokens at the beginning of both, where each keeps at least one of its own."""
    most = max(min(len(first), len(second)) - 1, 0)
    return next((place for place in range(most) if first[place] != second[place]), most)


def _best_division(shared: IntArray, count: int) -> list[tuple[int, int]]:
    """Divide a list into runs; a run saves what all its neighbours share, for all but one.

    Args:
        shared: Shape (count - 1,). What neighbours share.
        count: Length of the list.

    Returns:
        Start and end of each run, from the last run to the first.
    """
    saved, starts = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        # By the start of the run that ends here: from a run of one to one of all before.
        depths = np.append(0, np.minimum.accumulate(shared[: end - 1][::-1]))
        totals = saved[:end][::-1] + depths * np.arange(end)
        best = int(totals.argmax())
        saved[end], starts[end] = totals[best], end - 1 - best
    runs, end = [], count
    while end:
        runs.append((int(starts[end]), end))
        end = int(starts[end])
    return runs


def _longest_first(rows: Sequence[int], examples: EncodedExamples) -> IntArray:
    index = np.asarray(rows, dtype=np.int64)
    return index[np.argsort(-examples.lengths[index], kind="stable")]


def lay_out_groups(
    examples: EncodedExamples,
    groups: Sequence[PrefixGroup],
    max_tokens: int,
    device: torch.device,
) -> list[PrefixBatch]:
    """Put groups into rows of at most ``max_tokens``, splitting those that are larger.

    An example longer than that has a row of its own.
    """
    rows: list[list[PrefixGroup]] = []
    num_tokens = 0
    for group in (part for whole in groups for part in _split(whole, examples, max_tokens)):
        added = group.num_tokens(examples)
        if not rows or num_tokens + added > max_tokens:
            rows.append([])
            num_tokens = 0
        rows[-1].append(group)
        num_tokens += added
    return [_batch(examples, row, device) for row in rows]


def _split(group: PrefixGroup, examples: EncodedExamples, max_tokens: int) -> Iterator[PrefixGroup]:
    """Parts of a group that fit even when attention fills rests up to the longest of them."""
    rests = examples.lengths[group.rows] - 1 - group.num_shared
    start = 0
    while start < len(rests):
        most = max(1, (max_tokens - group.num_shared) // int(rests[start]))
        yield PrefixGroup(group.rows[start : start + most], group.num_shared)
        start += most


def _batch(
    examples: EncodedExamples, groups: Sequence[PrefixGroup], device: torch.device
) -> PrefixBatch:
    """One row of groups: its tokens, the positions that predict supervised ones, its blocks."""
    tokens: list[IntArray] = []
    positions: list[IntArray] = []
    targets: list[IntArray] = []
    predicting: list[IntArray] = []
    blocks: list[PrefixBlock] = []
    place = 0
    for rows, num_shared in groups:
        start = place
        whole = [examples.example(int(row)) for row in rows]
        tokens.append(whole[0][:num_shared])
        positions.append(np.arange(num_shared))
        place += num_shared
        for row, own in zip(rows, whole, strict=True):
            tokens.append(own[num_shared:-1])
            positions.append(np.arange(num_shared, len(own) - 1))
            before = np.arange(int(examples.response_starts[row]) - 1, len(own) - 1)
            predicting.append(before + np.where(before < num_shared, start, place - num_shared))
            targets.append(own[before + 1])
            place += len(own) - 1 - num_shared
        blocks.append(_block(examples.lengths[rows] - 1 - num_shared, start, num_shared, device))
    flat = np.concatenate(tokens).astype(np.int64)
    counts = [len(each) for each in targets]
    return PrefixBatch(
        MicroBatch(
            rows=np.concatenate([group.rows for group in groups]),
            input_ids_RL=torch.from_numpy(flat[None]).to(device),
            positions_S=torch.from_numpy(np.concatenate(predicting)).to(device),
            targets_S=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device),
            batch_rows_S=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            num_tokens=len(flat),
            segment_lengths=tuple(len(each) for each in tokens if len(each)),
            position_ids_RL=torch.from_numpy(np.concatenate(positions)[None]).to(device),
        ),
        tuple(blocks),
    )


def _block(rests: IntArray, start: int, num_shared: int, device: torch.device) -> PrefixBlock:
    """The place of a group whose rests have these lengths (N,)."""
    columns = np.arange(int(rests.max()))
    first = start + num_shared + np.cumsum(rests) - rests
    places = first[:, None] + np.minimum(columns, rests[:, None] - 1)
    queries, keys = num_shared + columns, np.arange(num_shared + len(columns))
    return PrefixBlock(
        start,
        start + num_shared + int(rests.sum()),
        num_shared,
        torch.from_numpy(places).to(device),
        torch.from_numpy(np.flatnonzero(columns < rests[:, None])).to(device),
        torch.from_numpy(queries[:, None] - keys[None]).to(device),
    )


@contextmanager
def prefixes_attended(model: nn.Module, blocks: Sequence[PrefixBlock]) -> Iterator[None]:
    """Let ``model`` attend within a row of these blocks, then as before.

    Only for models whose examples can be packed (`attention.packing_refusal`): there attention is
    all that moves anything between positions, and it goes through transformers' interface.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PREFIX_ATTENTION, partial(_prefix_attention, blocks=blocks))
    attending = cast("PreTrainedModel", model)
    before = str(attending.config._attn_implementation)
    attending.set_attn_implementation(PREFIX_ATTENTION)
    try:
        yield
    finally:
        attending.set_attn_implementation(before)


def _prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    blocks: Sequence[PrefixBlock],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a row, block by block.

    Args:
        module: The attention layer.
        query: Shape (1, H, T, D).
        key: Shape (1, H or fewer, T, D).
        value: As ``key``.
        attention_mask: Always None.
        blocks: What stands in the row.
        sliding_window: How many tokens, itself included, a token sees; None: all before it.
        options: Scaling and what else the model hands to its attention.

    Returns:
        Shape (1, T, H, D), and no attention weights.
    """
    assert attention_mask is None, "a row of blocks carries no attention mask"
    parts: list[torch.Tensor] = []
    for block in blocks:
        if block.num_shared:
            shared = slice(block.start, block.start + block.num_shared)
            at = torch.arange(block.num_shared, device=query.device)
            states = query[:, :, shared], key[:, :, shared], value[:, :, shared]
            parts.append(_attend(module, states, at[:, None] - at, sliding_window, options))
        states = _rests(query, block), _with_beginning(key, block), _with_beginning(value, block)
        rests = _attend(module, states, block.distance_LK, sliding_window, options)
        parts.append(rests.flatten(0, 1).index_select(0, block.kept)[None])
    return torch.cat(parts, dim=1), None


def _rests(states: torch.Tensor, block: PrefixBlock) -> torch.Tensor:
    """The rests of a block side by side, shape (N, heads, L, D), from (1, heads, T, D)."""
    # Token by token, as they lie in memory: heads of a token stand together.
    by_token = states[0].transpose(0, 1).flatten(1)
    chosen = by_token.index_select(0, block.rests_NL.flatten())
    return chosen.view(*block.rests_NL.shape, *states.shape[1::2]).transpose(1, 2)


def _with_beginning(states: torch.Tensor, block: PrefixBlock) -> torch.Tensor:
    """The same with the beginning before each, shape (N, heads, K, D)."""
    rests = _rests(states, block)
    if not block.num_shared:
        return rests
    beginning = states[:, :, block.start : block.start + block.num_shared]
    return torch.cat([beginning.expand(len(rests), -1, -1, -1), rests], dim=2)


def _attend(
    module: nn.Module,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    distance: torch.Tensor,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Causal attention of query, key and value, as transformers calls torch's; (N, L, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    output: torch.Tensor = sdpa_attention_forward(module, *states, seen[None, None], **options)[0]
    return output
