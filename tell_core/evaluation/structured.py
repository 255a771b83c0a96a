"""Metrics over structured answers: fields of JSON objects, slots, entities.

All are micro F1: 2 * right / (predicted + in the reference), summed over items before dividing.
Where there is nothing to find and nothing was predicted the answer is right: F1 is 1 there.

Shape letters: N items, D draws of item weights.
"""

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tell_core.errors import InputError
from tell_core.evaluation.base import (
    FloatArray,
    Metric,
    Payload,
    ScoredItem,
    normalised,
    ratio,
)
from tell_core.evaluation.parsing import first_object, value_text

Parts = Counter[tuple[Any, ...]]
_NAME_KEYS = ("slot", "name", "type", "label")
_VALUE_KEYS = ("value", "text")
_TAG = re.compile(r"(O)|([BI])-(.+)")


class PartsF1(Metric):
    """Micro F1 over the parts of an answer: whatever an answer is made of, compared one by one.

    A part that stands twice in the reference must be predicted twice. A prediction that cannot be
    read has no parts; where the reference has none either, it counts as one wrong part.

    Statistics, K = 3: right parts, parts of the prediction, parts of the reference.
    """

    options = frozenset({"field", "normalise"})
    expected: str

    def payloads(self, items: Sequence[ScoredItem]) -> list[Payload]:
        """Number of right parts, of predicted parts, of parts in the reference."""
        return [self._counts(item) for item in items]

    def _counts(self, item: ScoredItem) -> Payload:
        reference = self._reference(item)
        gold = self._parts(reference)
        if gold is None:
            raise InputError(
                f"metric {self.name!r}: the reference of test item {item.item_id} is"
                f" {reference[:60]!r}; needed: {self.expected}. Correct the test data, `field` or"
                " `evaluation.parse`."
            )
        text = item.predicted_text
        found = None if text is None else self._parts(text)
        if found is None:
            return [0, int(not gold), gold.total()]
        return [(found & gold).total(), found.total(), gold.total()]

    @abstractmethod
    def _parts(self, text: str) -> Parts | None:
        """The parts of an answer, or None when it cannot be read."""

    def _compared(self, text: str) -> str:
        return normalised(text) if self.spec.normalise else text

    def _score_sums(self, sums: FloatArray) -> FloatArray:
        parts = sums[:, 1] + sums[:, 2]
        return np.where(parts == 0, 1.0, ratio(2 * sums[:, 0], parts))


class JsonFieldF1(PartsF1):
    """Micro F1 over the key-value pairs of JSON objects.

    The first JSON object in the answer counts, as `parse_answer` finds it. A pair is a leaf with
    the keys on the way to it: {"a": {"b": 1}} has the pair (a, b) = 1. The elements of a list
    share its path and their order does not matter. Empty objects, empty lists and null are leaves.
    Leaves are compared as text: 1 equals "1", but not 1.0; true equals "true". White space around
    a string does not count; with ``normalise`` neither do case and punctuation of values. Keys are
    compared as they are.
    """

    name = "json_field_f1"
    expected = "a JSON object"

    def _parts(self, text: str) -> Parts | None:
        found = first_object(text)
        if found is None:
            return None
        return Counter((*path, self._compared(leaf)) for path, leaf in _leaves(found))


class SlotF1(PartsF1):
    """Micro F1 over slots, each a name with a value, written as JSON.

    Read as slots are: an object {name: value}, where a list holds several values of that name; and
    a list whose entries are objects with a name (``slot``, ``name``, ``type`` or ``label``) and a
    value (``value`` or ``text``), objects {name: value}, or pairs [name, value]. Entities as JSON
    are slots of their type. The whole text must be JSON, else the first object in it counts. Null,
    the empty string and the empty list mean that the slot is absent; a nested object is one value,
    with its keys sorted. Order does not matter. Values are compared as text after stripping (1
    equals "1"), names too; with ``normalise`` both without case and punctuation. An entry of a
    predicted list that is none of these is one wrong slot.
    """

    name = "slot_f1"
    expected = "slots as a JSON object or list (for BIO tags: metric 'entity_f1')"

    def _parts(self, text: str) -> Parts | None:
        slots = read_slots(text)
        if slots is None:
            return None
        return Counter((self._compared(name), self._compared(value)) for name, value in slots)

    def _counts(self, item: ScoredItem) -> Payload:
        slots = read_slots(self._reference(item)) or []
        if any(not name for name, _ in slots):
            raise InputError(
                f"metric {self.name!r}: the reference of test item {item.item_id} holds an entry"
                " that is no slot; needed: {name: value}, [name, value], or an object with a name"
                f" ({', '.join(_NAME_KEYS)}) and a value ({', '.join(_VALUE_KEYS)})"
            )
        return super()._counts(item)


class EntityF1(PartsF1):
    """Micro F1 over entities in BIO tag sequences: type, first and last token must all be right.

    Tags are O, B-type and I-type, one per token, between white space or commas, or as a JSON list
    of strings. Strict (seqeval's mode "strict" with scheme IOB2): an entity begins with B and goes
    on with I of the same type; an I that continues nothing is no entity. A prediction may have
    more or fewer tags than the reference: positions are counted from the first. Anything else than
    a tag is O in a prediction, and refused in a reference.
    """

    name = "entity_f1"
    options = frozenset({"field"})
    expected = "tags such as 'O B-city I-city' (for slots as JSON: metric 'slot_f1')"

    def _parts(self, text: str) -> Parts | None:
        tags = read_tags(text)
        return None if tags is None else Counter(entity_spans(tags))

    def _counts(self, item: ScoredItem) -> Payload:
        wrong = [t for t in read_tags(self._reference(item)) or [] if not _TAG.fullmatch(t)]
        if wrong:
            raise InputError(
                f"metric {self.name!r}: the reference of test item {item.item_id} holds"
                f" {wrong[0][:60]!r}; needed: {self.expected}"
            )
        return super()._counts(item)


def read_slots(text: str) -> list[tuple[str, str]] | None:
    """Slots as `SlotF1` reads them, in their order; an entry that is no slot has no name.

    Returns:
        Names and values, or None when the text holds neither a JSON object nor a list.
    """
    found = _json(text)
    if isinstance(found, list):
        return [slot for entry in found for slot in _entry_slots(entry)]
    return list(_object_slots(found)) if isinstance(found, dict) else None


def read_tags(text: str) -> list[str] | None:
    """Tags as `EntityF1` reads them; None for JSON that is no list of strings."""
    if not text.lstrip().startswith(("[", "{")):
        return re.split(r"[\s,]+", text.strip(" ,\t\r\n")) if text.strip(" ,\t\r\n") else []
    found = _json(text)
    if not isinstance(found, list) or not all(isinstance(tag, str) for tag in found):
        return None
    return [tag.strip() for tag in found]


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of a BIO sequence, strict: type, first token, token after the last."""
    spans: list[tuple[str, int, int]] = []
    open_kind = None
    for position, tag in enumerate(tags):
        found = _TAG.fullmatch(tag)
        kind = found[3] if found else None
        if found and found[2] == "B":
            spans.append((found[3], position, position + 1))
        elif kind is not None and kind == open_kind:
            spans[-1] = (kind, spans[-1][1], position + 1)
        else:
            kind = None
        open_kind = kind
    return spans


def _leaves(found: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and text of each leaf."""
    open_: list[tuple[tuple[str, ...], Any]] = [((), found)]
    while open_:
        path, value = open_.pop()
        if value and isinstance(value, dict):
            open_ += [((*path, key), inner) for key, inner in value.items()]
        elif value and isinstance(value, list):
            open_ += [(path, inner) for inner in value]
        else:
            text = value_text(value)
            yield path, "null" if text is None else text


def _json(text: str) -> Any:
    """The whole text as JSON list, else the first object in it, else None."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return first_object(text)


def _entry_slots(entry: Any) -> list[tuple[str, str]]:
    """Slots of one entry of a list."""
    if isinstance(entry, list) and len(entry) == 2:
        return list(_object_slots({value_text(entry[0]) or "": entry[1]}))
    if not isinstance(entry, dict):
        return [("", str(value_text(entry)))]
    names = [entry[key] for key in _NAME_KEYS if key in entry]
    values = [entry[key] for key in _VALUE_KEYS if key in entry]
    if names and values:
        return list(_object_slots({value_text(names[0]) or "": values[0]}))
    return list(_object_slots(entry))


def _object_slots(slots: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of an object; what is empty is absent."""
    for name, values in slots.items():
        for value in values if isinstance(values, list) else [values]:
            text = value_text(value)
            if text:
                yield name.strip(), text
