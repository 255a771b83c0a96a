"""Reading an answer out of text, the same way for predictions and references.

Nothing here raises on any text: what cannot be read has the value None, and every metric counts
that as wrong.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tell_core.spec.model import ParseSpec

_OBJECT_START = re.compile(r"\{")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Answer:
    """What was read out of one text.

    Attributes:
        value: The answer, or None when the text holds none (only with ``kind: json``).
        is_valid_json: Whether the text, prefix removed and stripped, is one JSON object and
            nothing else. This is stricter than having a value: an object inside other text is
            read, but is not valid JSON for a program that expects it.
    """

    value: str | None
    is_valid_json: bool


def parse_answer(text: str, spec: ParseSpec) -> Answer:
    """Read the answer out of ``text``.

    - ``drop_prefix`` is removed if the text begins with it; white space around the text and
      around the prefix does not matter, case does. A text without the prefix is kept whole.
    - ``kind: text``: the value is the rest, stripped, halves of surrogate pairs as U+FFFD. An empty
      text has the value "".
    - ``kind: json``: the first position at which a complete JSON object begins decides, whatever
      stands before or after it; an object nested in an unfinished one therefore counts. The value
      is that of the key ``field``, through `value_text`; without ``field`` it is the whole
      object. No object, a missing key, or null: None. Of a repeated key the last value counts.
      NaN and Infinity are not JSON.
    """
    body = drop_prefix(text, spec.drop_prefix)
    whole = _object_at(body, 0) if body.startswith("{") else None
    is_valid = whole is not None and whole[1] == len(body)
    if spec.kind == "text":
        return Answer(_LONE_SURROGATE.sub("\ufffd", body), is_valid)
    found = first_object(body)
    if found is None:
        return Answer(None, is_valid)
    return Answer(value_text(found if spec.field is None else found.get(spec.field)), is_valid)


def drop_prefix(text: str, prefix: str | None) -> str:
    """``text`` stripped, without ``prefix`` (stripped) at its beginning, stripped again."""
    body = text.strip()
    return body.removeprefix(prefix.strip()).strip() if prefix else body


def first_object(text: str) -> dict[str, Any] | None:
    """The JSON object that begins first in ``text``, or None."""
    attempts = (_object_at(text, match.start()) for match in _OBJECT_START.finditer(text))
    return next((decoded[0] for decoded in attempts if decoded is not None), None)


def value_text(value: Any) -> str | None:
    """A JSON value as the text that metrics compare.

    A string is stripped; null is None; everything else is compact JSON with sorted keys, so that
    true is "true", and 1 and 1.0 differ. Halves of surrogate pairs become U+FFFD. A value nested
    too deeply to be written is None.
    """
    if value is None:
        return None
    try:
        text = value.strip() if isinstance(value, str) else _ENCODER.encode(value)
    except RecursionError:
        return None
    return _LONE_SURROGATE.sub("\ufffd", text)


def _object_at(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):  # thousands of nested brackets exhaust the stack
        return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))
