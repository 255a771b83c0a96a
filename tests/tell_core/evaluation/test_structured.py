"""Field, slot and entity F1 against counts written independently, and their ambiguous cases."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.errors import InputError
from tell_core.evaluation.structured import entity_spans, read_slots
from tests.tell_core.evaluation.examples import TOLERANCE, item, items_of, metric_of, score

few = settings(max_examples=60, deadline=None)

leaves = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["x", "X ", "", "1"])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=6,
)
objects = st.dictionaries(st.sampled_from("abc"), values, max_size=3)
tags = st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=8)


def f1(pairs: list[tuple[Counter[Any] | None, Counter[Any]]]) -> float:
    """Micro F1 from the parts of prediction (None: unreadable) and reference."""
    right = wrong = missed = 0
    for found, gold in pairs:
        left = list(gold.elements())
        for part in found.elements() if found is not None else [object()] * (not gold):
            if part in left:
                left.remove(part)
                right += 1
            else:
                wrong += 1
        missed += len(left)
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def fields(value: Any, path: str = "") -> Counter[tuple[str, str]]:
    """Leaves of a JSON value with their paths, by recursion."""
    if isinstance(value, dict) and value:
        return sum((fields(v, f"{path}/{k}") for k, v in value.items()), Counter())
    if isinstance(value, list) and value:
        return sum((fields(v, path) for v in value), Counter())
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    return Counter([(path, text)])


@few
@given(st.lists(st.tuples(objects | st.just("none"), objects), min_size=1, max_size=5))
def test_json_field_f1_equals_its_definition(pairs: list[tuple[Any, dict[str, Any]]]) -> None:
    texts = [(found if found == "none" else json.dumps(found), json.dumps(gold))
             for found, gold in pairs]  # fmt: skip

    found = score(metric_of("json_field_f1"), items_of(texts))

    parts = [(None if found == "none" else fields(found), fields(gold)) for found, gold in pairs]
    assert found == pytest.approx(f1(parts), abs=TOLERANCE)


def spans_by_state(sequence: list[str]) -> set[tuple[str, int, int]]:
    """Strict BIO spans: from each B on while the next tag is I of its type."""
    found = set()
    for start, tag in enumerate(sequence):
        if tag.startswith("B-"):
            end = start + 1
            while end < len(sequence) and sequence[end] == f"I-{tag[2:]}":
                end += 1
            found.add((tag[2:], start, end))
    return found


@few
@given(st.lists(st.tuples(st.none() | tags, tags), min_size=1, max_size=6))
def test_entity_f1_equals_its_definition(pairs: list[tuple[list[str] | None, list[str]]]) -> None:
    texts = [(None if found is None else " ".join(found), " ".join(gold)) for found, gold in pairs]

    value = score(metric_of("entity_f1"), items_of(texts))

    parts = [
        (None if found is None else Counter(spans_by_state(found)), Counter(spans_by_state(gold)))
        for found, gold in pairs
    ]
    assert value == pytest.approx(f1(parts), abs=TOLERANCE)


@few
@given(
    st.lists(
        st.integers(1, 6).flatmap(
            lambda n: st.tuples(
                *[
                    st.lists(
                        st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), min_size=n, max_size=n
                    )
                ]
                * 2
            )
        ),
        min_size=1,
        max_size=5,
    )
)
@pytest.mark.filterwarnings("ignore")
def test_entity_f1_equals_seqeval(pairs: list[tuple[list[str], list[str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    found, gold = map(list, zip(*pairs, strict=True))
    if not any(spans_by_state(sequence) for sequence in found + gold):
        return

    expected = seqeval.f1_score(gold, found, mode="strict", scheme=scheme, zero_division=0)

    texts = [(" ".join(predicted), " ".join(reference)) for predicted, reference in pairs]
    assert score(metric_of("entity_f1"), items_of(texts)) == pytest.approx(expected, abs=TOLERANCE)


slot_objects = st.dictionaries(
    st.sampled_from(["city", "date"]),
    leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.just("k"), leaves, max_size=1),
    max_size=2,
)


@few
@given(st.lists(st.tuples(slot_objects, slot_objects), min_size=1, max_size=5))
def test_slot_f1_equals_its_definition(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    def slots(found: dict[str, Any]) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        for name, given_ in found.items():
            for value in given_ if isinstance(given_, list) else [given_]:
                is_text = isinstance(value, str)
                text = value.strip() if is_text else json.dumps(value, separators=(",", ":"))
                counts[name, text] += 0 if value is None or text == "" else 1
        return +counts

    texts = [(json.dumps(found), json.dumps(gold)) for found, gold in pairs]

    value = score(metric_of("slot_f1"), items_of(texts))

    expected = f1([(slots(found), slots(gold)) for found, gold in pairs])
    assert value == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    "text",
    [
        '{"city": ["Ypres", "Ghent"], "day": 5}',
        '{"day": "5", "city": ["Ghent", "Ypres"], "hour": null, "via": [], "note": " "}',
        '[{"slot": "city", "value": "Ypres"}, {"name": "city", "text": "Ghent"}, {"day": 5}]',
        '[["city", "Ypres"], ["city", ["Ghent"]], ["day", 5]]',
        '[{"type": "city", "text": "Ypres", "start": 3}, {"city": "Ghent", "day": "5"}]',
        'Here: {"city": ["Ypres", "Ghent"], "day": 5} as asked',
    ],
)
def test_slots_are_read_from_each_form(text: str) -> None:
    slots = read_slots(text)

    assert slots is not None
    assert sorted(slots) == [("city", "Ghent"), ("city", "Ypres"), ("day", "5")]


def test_strict_spans_begin_with_b() -> None:
    assert entity_spans(["I-x", "B-x", "I-x", "I-y", "I-x", "B-x", "B-x"]) == [
        ("x", 1, 3), ("x", 5, 6), ("x", 6, 7),
    ]  # fmt: skip


def test_tags_are_read_from_text_and_from_json() -> None:
    metric = metric_of("entity_f1")
    forms = ["B-a I-a O", "B-a, I-a, O", '["B-a", "I-a", "O"]', "B-a I-a O O O"]

    assert score(metric, items_of([(form, "B-a I-a O") for form in forms])) == 1.0
    assert score(metric, items_of([("no idea", "B-a I-a O")])) == 0.0


def test_nothing_to_find_and_nothing_found_is_right_but_an_unreadable_answer_is_not() -> None:
    metric = metric_of("entity_f1")

    assert score(metric, items_of([("O O", "O O")])) == 1.0
    assert score(metric, items_of([(None, "O O")])) == 0.0
    assert score(metric, items_of([('{"a": 1}', "O O")])) == 0.0


def test_normalised_values_ignore_case_and_punctuation() -> None:
    pair = [('{"a": "New-York."}', '{"a": "new york"}')]

    assert score(metric_of("json_field_f1"), items_of(pair)) == 0.0
    assert score(metric_of("json_field_f1", normalise=True), items_of(pair)) == 1.0


def test_reference_may_stand_in_a_column_as_it_is() -> None:
    items = [item('{"a": 1, "b": 2}', "ignored", gold={"b": 2, "a": 1})]

    assert score(metric_of("json_field_f1", field="gold"), items) == 1.0


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("json_field_f1", "[1, 2]", "test-0 is '.1, 2.'; needed: a JSON object"),
        ("slot_f1", "B-x O", r"needed: slots as a JSON object or list .* 'entity_f1'"),
        ("slot_f1", '["x"]', "test-0 holds an entry that is no slot"),
        ("entity_f1", '{"x": 1}', r"needed: tags such as .* 'slot_f1'"),
        ("entity_f1", "B-x S-x", "test-0 holds 'S-x'; needed: tags"),
    ],
)
def test_reference_of_another_form_is_refused_with_the_item(
    name: str, reference: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metric_of(name).payloads(items_of([(None, reference)]))


@pytest.mark.parametrize("name", ["json_field_f1", "slot_f1", "entity_f1"])
@given(
    text=st.text(max_size=20) | st.sampled_from(["[" * 1500, '{"a":' * 1500, "[[1]", '[{"":1}]'])
)
def test_no_prediction_is_an_error(name: str, text: str) -> None:
    reference = "B-x O" if name == "entity_f1" else '{"a": 1}'

    assert 0 <= score(metric_of(name), items_of([(text, reference)])) <= 1
