"""Greedy generation in batches.

Rows are sorted by length and padded on the left; a row that has ended leaves its batch, so that
short answers do not wait for long ones. Unlike `transformers.generate`, nothing in the model's
generation configuration but its end tokens has an effect.

Each answer is, up to rounding, what the model writes for that prompt alone: batch size and order
change only the order of floating-point sums. In float32 the answers were equal in every test; where
two tokens are tied to within rounding (bfloat16, above all) a different batch may choose the other.

Shape letters: R rows, L longest prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import IntArray
from tell_core.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PADDING_ID = 0  # any id will do: padding is masked


def generate_greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[IntArray],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    stop_ids: Collection[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue each prompt with the likeliest token until it ends.

    A row ends at any end token of the model or tokenizer, at any of ``stop_ids``, after
    ``max_new_tokens``, or where the model's context is full.

    Args:
        model: Causal language model on ``device``, in evaluation mode.
        tokenizer: Decodes the answers.
        prompts: N arrays of token ids, each of shape (length,), length >= 1.
        max_new_tokens: Longest answer in tokens, at least 1.
        batch_size: Prompts side by side, at least 1.
        device: Where the model is.
        stop_ids: Further ids that end an answer.
        on_progress: Called after each batch with answers done and N.

    Returns:
        N texts in the order of ``prompts``, without end token and special tokens.

    Raises:
        EvaluationError: A prompt is empty, or fills the model's context.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], dtype=np.int64)
    limits = np.minimum(_room(model, lengths), max_new_tokens)
    stops = end_token_ids(model, tokenizer) | frozenset(stop_ids)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        rows = longest_first[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        written = _continue(model, batch, limits[rows].tolist(), stops, device)
        for row, ids in zip(rows, written, strict=True):
            answers[row] = ids
        if on_progress:
            on_progress(start + len(rows), len(prompts))
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in answers
    ]


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End tokens named by the model's generation configuration, its configuration, the tokenizer.

    Each may name none, one or several.
    """
    holders = [getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer]
    named = [getattr(holder, "eos_token_id", None) for holder in holders]
    lists = [ids if isinstance(ids, list | tuple) else [ids] for ids in named]
    return frozenset(int(id_) for ids in lists for id_ in ids if id_ is not None)


def _room(model: nn.Module, lengths: IntArray) -> IntArray:
    """Tokens that fit into the model's context after prompts of these lengths."""
    if (lengths == 0).any():
        raise EvaluationError(
            f"prompt {int(np.argmin(lengths))} has no tokens: there is nothing to continue. Check"
            " the chat template; it must write something before the answer."
        )
    context = getattr(model.config, "max_position_embeddings", None) or np.iinfo(np.int64).max
    if (lengths >= context).any():
        raise EvaluationError(
            f"prompt {int(np.argmax(lengths))} has {int(lengths.max())} tokens and the model takes"
            f" {context}, answer included. Lower `curation.max_tokens`."
        )
    return np.asarray(context - lengths)


def _continue(
    model: nn.Module,
    prompts: Sequence[IntArray],
    limits: Sequence[int],
    stops: frozenset[int],
    device: torch.device,
) -> list[list[int]]:
    """Answers of one batch, as token ids without the end token, each at most its limit long."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    ids, mask = _pad_left(prompts, device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache: Any = None
    with torch.inference_mode():
        while True:
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen = output.logits[:, -1].argmax(dim=-1)
            kept: list[int] = []
            for index, (row, token) in enumerate(zip(going, chosen.tolist(), strict=True)):
                if token not in stops:
                    answers[row].append(token)
                    if len(answers[row]) < limits[row]:
                        kept.append(index)
            if not kept:
                return answers
            if len(kept) < len(going):
                going = [going[index] for index in kept]
                rows = torch.tensor(kept, dtype=torch.int64, device=device)
                cache.reorder_cache(rows)
                chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
            ids = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1


def _pad_left(
    prompts: Sequence[IntArray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, each of shape (R, L), int64."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), _PADDING_ID, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
