"""Anchor prompts: the constant text on task prompts, where it comes from and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tell_core.data.seeding import seeded_generator
from tell_core.errors import AnchorError, ModelError
from tell_core.spec.arms import TaskAnchor
from tell_core.spec.model import AnchorSpec
from tell_core.store import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLANK_LINE = "\n\n"
_MAX_LISTED_ROWS = 5
_NUM_WORDS = 1024
_MAX_DRAWS_PER_TOKEN = 200


@dataclass(frozen=True)
class Anchor:
    """An anchor prompt, ready to be put on prompts.

    Attributes:
        text: The anchor prompt with the white space that parts it from the prompt; "" for none.
        position: Where it stands.
        own_instruction: Constant beginning that was removed from the task's prompts.
        num_tokens: Tokens of ``text`` by itself.
    """

    text: str
    position: Literal["before", "after", "system"]
    own_instruction: str
    num_tokens: int = 0

    @classmethod
    def load(cls, path: Path) -> Anchor:
        """Read ``anchor.json``."""
        stored = read_json(path)
        return cls(
            text=stored["text"],
            position=stored["position"],
            own_instruction=stored["own_instruction"],
            num_tokens=stored["num_anchor_tokens"],
        )

    def record(self) -> dict[str, str | int]:
        """The content of ``anchor.json``."""
        return {
            "text": self.text,
            "position": self.position,
            "own_instruction": self.own_instruction,
            "num_anchor_tokens": self.num_tokens,
        }


def resolve_anchor(
    spec: AnchorSpec,
    prompts: Sequence[str],
    lengths: Sequence[int | None] | None,
    places: Sequence[str] | None = None,
) -> Anchor:
    """Find the anchor prompt and the constant beginning to remove from the task's prompts.

    With position ``before`` and the task's own prefix, anchor and bare prompt joined are the
    original prompt, byte for byte. A given text that does not end (before) or begin (after) with
    white space is parted from the prompt by a blank line.

    Args:
        spec: Section `anchor` of the specification.
        prompts: All prompts of the task, test items included.
        lengths: Length of the constant beginning of each prompt in characters, from
            `length_column`; None to find it.
        places: Where each prompt comes from, for messages; rows are numbered otherwise.

    Raises:
        AnchorError: Prompts do not begin alike, or the lengths do not fit them.
    """
    if spec.source == "none":
        return Anchor("", spec.position, "")
    if spec.source == "given":
        return Anchor(_parted(spec.text or "", spec.position), spec.position, "")
    names = places or [f"row {row}" for row in range(1, len(prompts) + 1)]
    prefix = _common_prefix(prompts) if lengths is None else _marked_prefix(prompts, lengths, names)
    text = prefix if spec.position == "before" else _parted(prefix, spec.position)
    return Anchor(text, spec.position, prefix)


def apply_anchor(
    kind: TaskAnchor,
    anchor: Anchor,
    prompt: str,
    system: str | None,
    random_text: str = "",
) -> tuple[str | None, str]:
    """System message and prompt as an arm sees them.

    Args:
        kind: own: the task's own instruction before the prompt; anchor: the anchor prompt at its
            position; none: the bare prompt; random: ``random_text`` at the anchor's position.
        anchor: The resolved anchor.
        prompt: Bare prompt.
        system: System message of the example.
        random_text: Text of as many tokens as the anchor, for kind random.
    """
    if kind == "none":
        return system, prompt
    if kind == "own":
        return system, anchor.own_instruction + prompt
    text = anchor.text if kind == "anchor" else random_text
    if anchor.position == "before":
        return system, text + prompt
    if anchor.position == "after":
        return system, prompt + text
    joined = _BLANK_LINE.join(part for part in (system, text) if part)
    return joined or None, prompt


def random_anchor(tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int) -> str:
    """Meaningless text of exactly ``num_tokens`` tokens, the null control of an anchor prompt.

    Words are drawn from the vocabulary; from two tokens on the text ends with a line break, so
    that it does not run into the prompt.

    Raises:
        ModelError: The vocabulary has no words that tokenise to themselves.
    """
    if num_tokens == 0:
        return ""
    rng = seeded_generator(seed, "random_anchor")
    words = _stable_words(tokenizer, rng)
    end = "\n" if num_tokens > 1 else ""
    text = ""
    for word in rng.choice(words, size=_MAX_DRAWS_PER_TOKEN * num_tokens) if words else ():
        longer = text + str(word)
        length = _count_tokens(tokenizer, longer + end)
        if length == num_tokens:
            return longer + end
        if length < num_tokens:
            text = longer
    raise ModelError(
        f"no random text of exactly {num_tokens} tokens could be made from this tokenizer's"
        " vocabulary; leave the arm tell_random_anchor out."
    )


def with_num_tokens(anchor: Anchor, num_tokens: int) -> Anchor:
    """The anchor with its length in tokens."""
    return replace(anchor, num_tokens=num_tokens)


def _common_prefix(prompts: Sequence[str]) -> str:
    """Longest common beginning that ends with white space and leaves no prompt empty."""
    first, last = min(prompts), max(prompts)  # in sorted order, what these share all share
    end = next(
        (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(last)),
    )
    end = min(end, min(map(len, prompts)) - 1)
    while end > 0 and not first[end - 1].isspace():
        end -= 1
    prefix = first[: max(end, 0)]
    if not prefix.strip():
        raise AnchorError(
            f"anchor.source is task_prefix, but the {len(prompts)} prompts of the task have no"
            " common beginning. Give an anchor prompt with `source: given` and `text`, name the"
            " column with the prefix's length in `length_column`, or set `source: none`."
        )
    return prefix


def _marked_prefix(
    prompts: Sequence[str], lengths: Sequence[int | None], names: Sequence[str]
) -> str:
    """The one constant beginning that all lengths mark."""
    rows = list(zip(prompts, lengths, names, strict=True))
    unfit = [name for prompt, n, name in rows if n is None or not 0 <= n <= len(prompt)]
    if unfit:
        raise AnchorError(
            f"anchor.length_column: needed is a whole number between 0 and the prompt's length;"
            f" it is missing or another value in {_listed(unfit)}."
        )
    prefix = prompts[0][: lengths[0]]
    other = [name for prompt, n, name in rows if prompt[:n] != prefix]
    if other:
        raise AnchorError(
            f"anchor.length_column: the marked beginning must be the same in all rows; it is"
            f" {prefix[:60]!r} in {names[0]}, and another in {_listed(other)}. Mend those rows,"
            " or leave `length_column` out to take the longest common beginning."
        )
    if not prefix:
        raise AnchorError(
            "anchor.length_column marks an empty beginning in every row. Give an anchor prompt"
            " with `source: given` and `text`, or set `source: none`."
        )
    return prefix


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED_ROWS])
    more = len(names) - _MAX_LISTED_ROWS
    return f"{shown} and {more} more" if more > 0 else shown


def _parted(text: str, position: str) -> str:
    """``text`` with a blank line on the side of the prompt, unless white space is there."""
    if position == "before" and not text[-1].isspace():
        return text + _BLANK_LINE
    if position == "after" and not text[0].isspace():
        return _BLANK_LINE + text
    return text


def _stable_words(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> list[str]:
    """Words of the vocabulary that tokenise to one token; printable pieces if there are none."""
    special = set(tokenizer.all_special_ids)
    ids = np.asarray(sorted(set(tokenizer.get_vocab().values()) - special))
    words: list[str] = []
    pieces: list[str] = []
    for token in rng.permutation(ids):
        text = str(tokenizer.decode([int(token)]))
        if not (text.isascii() and text.isprintable() and text.strip()):
            continue
        if _count_tokens(tokenizer, text) == 1:
            (words if text[0] == " " and text[1:].isalpha() else pieces).append(text)
        if len(words) == _NUM_WORDS:
            break
    return words or pieces


def _count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
