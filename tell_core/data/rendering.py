"""Rendering: from an example to the tokens a chat model reads, and which of them are supervised.

The context of training equals the context of generation token for token: prompt text and the rest
of the conversation are tokenised apart, so no merge reaches across the place where the model
begins to answer. Supervised are the response and the marker that ends the turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateError

from tell_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[list[int], int]
_SENTINEL = "Qz7-sentinel-7zQ"
_MAX_BYTES_PER_CHARACTER = 4


class Example(NamedTuple):
    """One prompt-response pair with what stands before it.

    Attributes:
        prompt: Last user turn.
        response: Last assistant turn; "" where only the prompt is rendered.
        system: System message, or None for whatever the template does by itself.
        history: Earlier turns as (role, content).
    """

    prompt: str
    response: str = ""
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()


class ChatRenderer:
    """Renders examples with the chat template of a tokenizer, or with a given template.

    A tokenizer without a template gets the plainest one: ``"{prompt}\\n"``, response, end of text;
    a system message and earlier turns then stand line by line before the prompt.

    Args:
        tokenizer: Tokenizer of the base model.
        chat_template: Text of a Jinja template that replaces the tokenizer's own.

    Raises:
        ModelError: The tokenizer has no end-of-text token where one is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template or _own_template(tokenizer)

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of vocabulary, merges and special tokens."""
        return _digest(_tokenizer_state(self.tokenizer))

    @cached_property
    def template_digest(self) -> str:
        """sha256 of the chat template."""
        return _digest(self.chat_template or "")

    @property
    def digest(self) -> str:
        """sha256 over tokenizer and template: equal digests render alike."""
        return _digest([self.tokenizer_digest, self.template_digest])

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Token ids and position of the first supervised token, per example.

        Raises:
            ModelError: The template cannot take a system message, changes the response, or
                renders the prompt differently once the response follows.
        """
        contexts = [self.prompt_text(example) for example in examples]
        answers = [
            self._answer_text(example, context)
            for example, context in zip(examples, contexts, strict=True)
        ]
        context_ids, answer_ids = self._tokenise(contexts), self._tokenise(answers)
        return [
            (context + answer, len(context))
            for context, answer in zip(context_ids, answer_ids, strict=True)
        ]

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of the context in which the model begins to answer, per example."""
        return self._tokenise([self.prompt_text(example) for example in examples])

    def prompt_text(self, example: Example) -> str:
        """Text in which the model begins to answer."""
        if self.chat_template is None:
            return "".join(f"{content}\n" for _, content in _conversation(example))
        text = self._apply(_conversation(example), add_generation_prompt=True, example=example)
        if example.system and example.system.strip() not in text:
            raise ModelError(_no_system_role("leaves the system message out"))
        return text

    def num_text_tokens(self, text: str) -> int:
        """Tokens of a piece of text by itself."""
        return len(self._tokenise([text])[0])

    def _answer_text(self, example: Example, context: str) -> str:
        """What follows the context: the response and the marker that ends the turn."""
        if self.chat_template is None:
            return example.response + self._end_of_text
        messages = [*_conversation(example), ("assistant", example.response)]
        full = self._apply(messages, add_generation_prompt=False, example=example)
        if not full.startswith(context):
            raise ModelError(_unstable(context, full))
        answer = full[len(context) :]
        if not answer.endswith(self._turn_end):
            raise ModelError(
                f"the chat template ends an answer with {answer[-40:]!r}, elsewhere with"
                f" {self._turn_end!r}: where the response ends cannot be told. Give another"
                " template under `model.chat_template`."
            )
        body = answer[: len(answer) - len(self._turn_end)]
        if example.response.strip() not in body:
            raise ModelError(
                "the chat template changes the response: it was"
                f" {example.response[:80]!r} and became {body[:80]!r}. Give a template under"
                " `model.chat_template` that leaves responses as they are."
            )
        return body + (self._turn_end.rstrip() or self._end_of_text)

    @cached_property
    def _turn_end(self) -> str:
        """What the template writes after a response, white space included."""
        example = Example("Hello", _SENTINEL)
        messages = [*_conversation(example), ("assistant", _SENTINEL)]
        text = self._apply(messages, add_generation_prompt=False, example=example)
        _, found, end = text.rpartition(_SENTINEL)
        if not found:
            raise ModelError(
                "the chat template leaves the assistant's turn out; give a complete one under"
                " `model.chat_template`."
            )
        return end

    @property
    def _end_of_text(self) -> str:
        token = self.tokenizer.eos_token
        if not token:
            raise ModelError(
                "the tokenizer has no end-of-text token and its template ends turns with nothing:"
                " the model could never learn to stop. Set `eos_token` in tokenizer_config.json."
            )
        return str(token)

    def _apply(
        self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool, example: Example
    ) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except TemplateError as error:
            if example.system is not None:
                raise ModelError(_no_system_role(f"refuses it ({error})")) from error
            raise ModelError(
                f"the chat template cannot render a conversation of the roles"
                f" {' '.join(role for role, _ in messages)}: {error}. Give another template under"
                " `model.chat_template`."
            ) from error

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def with_shots(example: Example, shots: Sequence[Example]) -> Example:
    """Put solved examples before the prompt, as earlier turns of user and assistant."""
    turns = [
        turn
        for shot in shots
        for turn in (*shot.history, ("user", shot.prompt), ("assistant", shot.response))
    ]
    return example._replace(history=(*turns, *example.history))


def load_chat_template(path: str | None) -> str | None:
    """Text of a Jinja file, or None when no path is given.

    Raises:
        ModelError: The file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.chat_template: cannot read {path} ({error}); give the path of a Jinja file in"
            " UTF-8, or leave the key out to use the tokenizer's own template."
        ) from error


def label_mask_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], response_start: int
) -> list[tuple[str, bool]]:
    """Text of each token and whether it is supervised, for coloured display.

    Tokens that hold only part of a character stand together with the rest of it; otherwise the
    texts joined are the text of all tokens.
    """
    pieces: list[tuple[str, bool]] = []
    context: list[int] = []
    pending: list[int] = []
    for position, token in enumerate(ids):
        pending.append(int(token))
        text = _text_after(tokenizer, context, pending)
        is_last = position + 1 in (response_start, len(ids))
        if text.endswith("\ufffd") and not is_last and len(pending) < _MAX_BYTES_PER_CHARACTER:
            continue
        pieces.append((text, position >= response_start))
        context, pending = pending, []
    return pieces


def _text_after(tokenizer: PreTrainedTokenizerBase, context: list[int], tokens: list[int]) -> str:
    """Text that ``tokens`` add; alone, some tokenizers would drop their leading space."""
    before = str(tokenizer.decode(context)) if context else ""
    text = str(tokenizer.decode(context + tokens))
    return text[len(before) :] if text.startswith(before) else str(tokenizer.decode(tokens))


def _conversation(example: Example) -> list[tuple[str, str]]:
    system = [("system", example.system)] if example.system is not None else []
    return [*system, *example.history, ("user", example.prompt)]


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template or None


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What decides about token ids; padding and truncation, set by use, do not."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [sorted(tokenizer.get_vocab().items()), special]
    state = json.loads(backend.to_str())
    return [{key: state[key] for key in state if key not in ("padding", "truncation")}, special]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _no_system_role(what: str) -> str:
    return (
        f"a system message was given, but the chat template {what}. Set `anchor.position` to"
        " before or after, drop the system column, or give a template under"
        " `model.chat_template` that has a system role."
    )


def _unstable(context: str, full: str) -> str:
    same = next(
        (at for at, pair in enumerate(zip(context, full, strict=False)) if pair[0] != pair[1]),
        min(len(context), len(full)),
    )
    return (
        "the chat template is not prefix-stable: with the response the text is no longer a"
        f" continuation of the prompt; they part at character {same}:"
        f" {context[same : same + 60]!r} against {full[same : same + 60]!r}. Give a template"
        " under `model.chat_template` that renders the prompt alike in both."
    )
