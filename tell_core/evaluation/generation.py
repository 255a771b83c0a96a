"""Generation in batches: greedy, or drawn from a random stream that each item has to itself.

Rows of similar limit and length are put together and padded on the left; a row that has ended
leaves its batch, so that short answers do not wait for long ones. Unlike `transformers.generate`,
nothing in the model's generation configuration but its end tokens has an effect.

Each answer is, up to rounding, what the model writes for that prompt alone: batch size and order
change only the order of floating-point sums. In float32 the answers were equal in every test; where
two tokens are tied to within rounding (bfloat16, above all) a different batch may choose the other.
Repeats measure how often that happens.

Shape letters: N requests, R rows of a batch, L longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import IntArray
from tell_core.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Counted = Callable[[int, int], None]
_PADDING_ID = 0  # any id will do: padding is masked
_MAX_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: Shape (length,), length >= 1. Token ids.
        max_new_tokens: Longest answer in tokens, at least 1.
        seed: Of the random stream from which its tokens are drawn, not negative.
    """

    prompt: IntArray
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and what ends an answer.

    Attributes:
        stop: Strings that end an answer; it is cut off before the first of them. One that is a
            special token's text ends the answer at that token.
        stop_ids: Token ids that end an answer, beside the model's own end tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: Tokens are drawn from the likeliest that together hold this probability.
    """

    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int,
    device: torch.device,
    order_seed: int | None = None,
    on_progress: Counted | None = None,
) -> list[str]:
    """Continue each prompt until it ends.

    A row ends at any end token of the model or tokenizer, at any stop id, at a stop string, at its
    limit, or where the model's context is full.

    Args:
        model: Causal language model on ``device``, in evaluation mode.
        tokenizer: Decodes the answers.
        requests: N prompts with their limits.
        decoding: How tokens are chosen and what ends an answer.
        batch_size: Prompts side by side, at least 1.
        device: Where the model is.
        order_seed: Puts the batches together at random, and at least two of them, which changes
            nothing but rounding; None groups similar prompts, which is fastest.
        on_progress: Called after each batch with answers done and N.

    Returns:
        N texts in the order of ``requests``, without end token, special tokens and stop string.

    Raises:
        EvaluationError: A prompt is empty, or fills the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    limits = limits_in_context(requests, context)
    ends = end_token_ids(model, tokenizer) | special_stops(tokenizer, decoding)
    answers: list[list[int]] = [[] for _ in requests]
    num_done = 0
    for rows in _batches(requests, limits, batch_size, order_seed):
        batch = [requests[row] for row in rows]
        endings = _Endings(tokenizer, decoding.stop, ends, [limits[row] for row in rows])
        written = _continue(
            model, batch, _Choice(batch, max(endings.limits), decoding, device), endings, device
        )
        for row, ids in zip(rows, written, strict=True):
            answers[row] = ids
        num_done += len(rows)
        if on_progress:
            on_progress(num_done, len(requests))
    return [answer_text(tokenizer, ids, decoding.stop) for ids in answers]


def generate_greedy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[IntArray],
    *,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device,
    stop_ids: Collection[int] = (),
    stop: Collection[str] = (),
    on_progress: Counted | None = None,
) -> list[str]:
    """`generate` the likeliest tokens, with one limit for all prompts."""
    return generate(
        model,
        tokenizer,
        [Request(prompt, max_new_tokens) for prompt in prompts],
        Decoding(stop=tuple(stop), stop_ids=frozenset(stop_ids)),
        batch_size=batch_size,
        device=device,
        on_progress=on_progress,
    )


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End tokens named by the model's generation configuration, its configuration, the tokenizer.

    Each may name none, one or several.
    """
    holders = [getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer]
    named = [getattr(holder, "eos_token_id", None) for holder in holders]
    lists = [ids if isinstance(ids, list | tuple) else [ids] for ids in named]
    return frozenset(int(id_) for ids in lists for id_ in ids if id_ is not None)


def special_stops(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> frozenset[int]:
    """Ids at which answers stop: the stop ids, and stop strings that are special tokens.

    Special tokens leave no text behind, so that only their id can be looked for.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    named = {id_ for id_, token in added if token.special and str(token) in decoding.stop}
    return decoding.stop_ids | named


def limits_in_context(requests: Sequence[Request], context: int | None) -> list[int]:
    """Longest answer of each request that the model's context has room for, in tokens.

    Args:
        requests: The requests.
        context: Longest sequence that the model takes; None when it has no limit.

    Raises:
        EvaluationError: A prompt is empty, or leaves no room.
    """
    lengths = [len(request.prompt) for request in requests]
    for index, length in enumerate(lengths):
        if length == 0:
            raise EvaluationError(
                f"prompt {index} has no tokens: there is nothing to continue. Check the chat"
                " template; it must write something before the answer."
            )
        if context is not None and length >= context:
            raise EvaluationError(
                f"prompt {index} has {length} tokens and the model takes {context}, answer"
                " included. Lower `curation.max_tokens`."
            )
    given = [request.max_new_tokens for request in requests]
    if context is None:
        return given
    return [min(limit, context - length) for limit, length in zip(given, lengths, strict=True)]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> str:
    """The text of token ids without special tokens, cut off before the first stop string."""
    text = _text(tokenizer, ids)
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def _batches(
    requests: Sequence[Request], limits: Sequence[int], batch_size: int, order_seed: int | None
) -> list[list[int]]:
    """Rows of each batch.

    Sorted by the power of two above the limit, then by the length of the prompt, largest first:
    rows of a batch end at about the same time, and little of it is padding.
    """
    size = batch_size
    if order_seed is None:
        lengths = np.asarray([len(request.prompt) for request in requests])
        powers = np.asarray([limit.bit_length() for limit in limits])
        order = np.lexsort((-lengths, -powers))
    else:
        order = np.random.default_rng(order_seed).permutation(len(requests))
        size = max(1, min(batch_size, -(-len(requests) // 2)))
    return [order[start : start + size].tolist() for start in range(0, len(requests), size)]


class _Endings:
    """Knows when an answer is over.

    Attributes:
        limits: Longest answer of each row, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        ends: frozenset[int],
        limits: Sequence[int],
    ) -> None:
        self.limits = limits
        self._ends = ends
        self._stop = stop
        self._tokenizer = tokenizer
        # A token stands for at least a byte: these many tokens hold the longest stop string.
        self._window = _MAX_BYTES_PER_CHARACTER * max(map(len, stop), default=0) + 1

    def append(self, row: int, answer: list[int], token: int) -> bool:
        """Add ``token`` to the row's answer unless it ends it; whether more may follow."""
        if token in self._ends:
            return False
        answer.append(token)
        return len(answer) < self.limits[row] and not self._has_stop(answer)

    def _has_stop(self, answer: list[int]) -> bool:
        """Whether a stop string is complete; what the last tokens suggest, the whole confirms."""
        return bool(self._stop) and all(
            any(stop in text for stop in self._stop)
            for text in (_text(self._tokenizer, ids) for ids in (answer[-self._window :], answer))
        )


class _Choice:
    """Chooses the next token of each row."""

    def __init__(
        self, requests: Sequence[Request], num_steps: int, decoding: Decoding, device: torch.device
    ) -> None:
        self._decoding = decoding
        if decoding.temperature > 0:
            draws = [uniform_draws(request.seed, num_steps) for request in requests]
            self._draws = torch.from_numpy(np.stack(draws)).to(device)

    def __call__(self, logits: torch.Tensor, going: Sequence[int], step: int) -> torch.Tensor:
        """Token ids, shape (R,), of the rows ``going`` from their logits of shape (R, V)."""
        if self._decoding.temperature == 0:
            return logits.argmax(dim=-1)
        draws = self._draws[:, step][list(going)]
        return draw_tokens(logits, draws, self._decoding.temperature, self._decoding.top_p)


def uniform_draws(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The first ``count`` numbers of a random stream, uniform in [0, 1), a multiple of 2**-32."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.integers(0, 2**32, size=count) / 2**32


def draw_tokens(
    logits: torch.Tensor, draws: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution, in float64.

    The likeliest tokens whose probability together reaches ``top_p`` are kept, the one that
    reaches it included; ties keep the smaller id.

    Args:
        logits: Shape (R, V).
        draws: Shape (R,), uniform in [0, 1).
        temperature: Above 0; divides the logits.
        top_p: Above 0, at most 1.

    Returns:
        Shape (R,). Token ids.
    """
    kept = torch.softmax(logits.double() / temperature, dim=-1)
    ids: torch.Tensor | None = None
    if top_p < 1:
        kept, ids = kept.sort(dim=-1, descending=True, stable=True)
        kept = kept.masked_fill(kept.cumsum(dim=-1) - kept >= top_p, 0.0)
    sums = kept.cumsum(dim=-1)
    places = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
    return (places if ids is None else ids.gather(1, places))[:, 0]


def _continue(
    model: nn.Module,
    requests: Sequence[Request],
    choose: _Choice,
    endings: _Endings,
    device: torch.device,
) -> list[list[int]]:
    """Answers of one batch, as token ids without the end token, each at most its limit long."""
    answers: list[list[int]] = [[] for _ in requests]
    going = list(range(len(requests)))
    ids, mask = _pad_left([request.prompt for request in requests], device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache: Any = None
    with torch.inference_mode():
        for step in range(max(endings.limits)):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen = choose(output.logits[:, -1], going, step)
            tokens = zip(going, chosen.tolist(), strict=True)
            goes_on = [endings.append(row, answers[row], token) for row, token in tokens]
            kept = [index for index, is_kept in enumerate(goes_on) if is_kept]
            if not kept:
                break
            if len(kept) < len(going):
                going = [going[index] for index in kept]
                rows = torch.tensor(kept, dtype=torch.int64, device=device)
                cache.reorder_cache(rows)
                chosen, mask, positions = chosen[rows], mask[rows], positions[rows]
            ids = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
    return answers


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
