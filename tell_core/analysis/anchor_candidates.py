"""Candidates for an anchor prompt: the base model is shown solved examples and asked what they ask.

Every candidate sees examples of its own draw, all from the task's training data. What the model
writes is filtered: a text that repeats an example would hand a solved item to every prompt, and one
that is no instruction at all is none. Rejected texts are kept with their reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from tell_core.data.rendering import ChatRenderer, Example
from tell_core.data.seeding import seeded_generator
from tell_core.data.shingles import ShingleSets, word_shingles
from tell_core.data.words import hash_words

if TYPE_CHECKING:
    import torch
    from torch import nn

Reason = Literal[
    "no room in the context", "empty", "unprintable", "too short", "too long", "leaks an example",
    "duplicate", "near-duplicate",
]  # fmt: skip

MIN_WORDS = 3
LEAK_WORDS = 5
"""A run of so many words that a text shares with some examples, but not with all, is a leak."""
NEAR_DUPLICATE = 0.8
"""Jaccard similarity of the pairs of words from which on two texts are near-duplicates."""
_MAX_CHARACTERS = 600  # of a shown input or output, so that one of them leaves room for others
_LABEL = re.compile(r"^\s*(instructions?|task|prompt):\s*", re.IGNORECASE)
_BATCH = 4
_ASK = (
    "Here are examples of one task, each with an input and the output that was expected.\n\n"
    "{examples}\n\n"
    "Write the instruction that someone needs to turn such inputs into such outputs. It must hold"
    " for every input of this kind, not for these alone. Answer with the instruction only."
)


@dataclass(frozen=True)
class Proposing:
    """How candidates are drawn.

    Attributes:
        num_candidates: Texts to draw.
        num_examples: Solved examples that each is written from.
        max_tokens: Longest candidate in tokens.
        temperature: Of the draws.
        top_p: Of the draws.
        seed: Of examples and draws.
    """

    num_candidates: int = 12
    num_examples: int = 5
    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


class Drawn(NamedTuple):
    """A text that the model wrote.

    Attributes:
        text: As it was written.
        shown: The examples it was written from, without anchor prompt; none where the model's
            context does not hold the question with a single one.
    """

    text: str
    shown: tuple[Example, ...]


class Rejected(NamedTuple):
    """A text set aside, and why."""

    text: str
    reason: Reason


def draw_candidates(
    model: nn.Module,
    renderer: ChatRenderer,
    pool: Sequence[Example],
    how: Proposing,
    device: torch.device,
) -> list[Drawn]:
    """Let the model write instructions for examples of the task.

    Args:
        model: Causal language model on ``device``, in evaluation mode.
        renderer: Its chat renderer.
        pool: Training examples of the task, without anchor prompt.
        how: How many, from how many examples, at what temperature. Fewer examples are shown where
            the model's context does not hold more.
        device: Where the model is.
    """
    from tell_core.evaluation.generation import Decoding, Request, generate

    max_new_tokens = how.max_tokens + 1  # one more than may be kept: a longer text is told by it
    context = getattr(model.config, "max_position_embeddings", None)
    room = None if context is None else context - max_new_tokens
    asked = [_fitting(examples, renderer, room) for examples in _shown(pool, how)]
    requests = [
        Request(np.asarray(prompt, dtype=np.int32), max_new_tokens, how.seed + number)
        for number, (prompt, examples) in enumerate(asked)
        if examples
    ]
    decoding = Decoding(temperature=how.temperature, top_p=how.top_p)
    texts = iter(
        generate(model, renderer.tokenizer, requests, decoding, batch_size=_BATCH, device=device)
    )
    return [Drawn(next(texts) if examples else "", examples) for _, examples in asked]


def _fitting(
    examples: tuple[Example, ...], renderer: ChatRenderer, room: int | None
) -> tuple[list[int], tuple[Example, ...]]:
    """The question with as many of the examples as there is room for, and which these are."""
    while examples:
        (prompt,) = renderer.prompt_ids([Example(_ask(examples))])
        if room is None or len(prompt) <= room:
            return prompt, examples
        examples = examples[:-1]
    return [], ()


def filter_candidates(
    drawn: Sequence[Drawn], renderer: ChatRenderer, max_tokens: int
) -> tuple[list[str], list[Rejected]]:
    """Texts that may serve as an anchor prompt, cleaned, in the order drawn; and the others.

    Args:
        drawn: What the model wrote.
        renderer: Counts tokens.
        max_tokens: Longest text that is kept.
    """
    kept: list[str] = []
    rejected: list[Rejected] = []
    for one in drawn:
        text = clean(one.text)
        reason = _fault(text, one.shown, renderer, max_tokens) or _likeness(text, kept)
        if reason:
            rejected.append(Rejected(one.text, reason))
        else:
            kept.append(text)
    return kept, rejected


def clean(text: str) -> str:
    """The first paragraph, without a label before it or quotation marks around it."""
    text = _LABEL.sub("", text).strip().split("\n\n")[0].strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def leaks(text: str, shown: Sequence[Example]) -> bool:
    """Whether ``text`` repeats something of single examples.

    What stands in all of them, such as the form of the answer, belongs to the task.
    """
    examples = [f"{one.prompt}\n{one.response}" for one in shown]
    sets = word_shingles(hash_words([text, *examples]), LEAK_WORDS)
    own = _of(sets, 0)
    found = np.array([np.isin(own, _of(sets, row + 1)) for row in range(len(examples))])
    return bool((found.any(axis=0) & ~found.all(axis=0)).any())


def _shown(pool: Sequence[Example], how: Proposing) -> Iterator[tuple[Example, ...]]:
    """Examples for each candidate, drawn without replacement."""
    for number in range(how.num_candidates):
        order = seeded_generator(how.seed, "anchor examples", number).permutation(len(pool))
        yield tuple(pool[place] for place in order[: how.num_examples].tolist())


def _ask(examples: Sequence[Example]) -> str:
    parts = [
        f"Input: {one.prompt.strip()[:_MAX_CHARACTERS]}\n"
        f"Output: {one.response.strip()[:_MAX_CHARACTERS]}"
        for one in examples
    ]
    return _ASK.format(examples="\n\n".join(parts))


def _fault(
    text: str, shown: Sequence[Example], renderer: ChatRenderer, max_tokens: int
) -> Reason | None:
    """What is wrong with a text by itself."""
    if not shown:
        return "no room in the context"
    if not text:
        return "empty"
    if "\ufffd" in text or not all(sign.isprintable() or sign in "\n\t" for sign in text):
        return "unprintable"
    if len(hash_words([text]).hashes) < MIN_WORDS:
        return "too short"
    if renderer.num_text_tokens(text) > max_tokens:
        return "too long"
    return "leaks an example" if _is_response(text, shown) or leaks(text, shown) else None


def _is_response(text: str, shown: Sequence[Example]) -> bool:
    return any(text == one.response.strip() for one in shown)


def _likeness(text: str, kept: Sequence[str]) -> Reason | None:
    """Whether a text has been kept already, or almost."""
    if text in kept:
        return "duplicate"
    sets = word_shingles(hash_words([text, *kept]), 2)
    own = _of(sets, 0)
    for row in range(1, len(kept) + 1):
        other = _of(sets, row)
        num_common = len(np.intersect1d(own, other))
        if num_common >= NEAR_DUPLICATE * (len(own) + len(other) - num_common):
            return "near-duplicate"
    return None


def _of(sets: ShingleSets, row: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return sets.hashes[sets.offsets[row] : sets.offsets[row + 1]]
