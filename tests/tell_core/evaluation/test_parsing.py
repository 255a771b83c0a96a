"""Reading answers out of text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.evaluation.parsing import first_object, parse_answer, value_text
from tell_core.spec.model import ParseSpec

TEXT = ParseSpec()
OBJECT = ParseSpec(kind="json")
LABEL = ParseSpec(kind="json", field="label")
few = settings(max_examples=40, deadline=None)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=4)
json_like = st.lists(
    st.sampled_from(['{"label": ', "{", "}", '"', "yes", "[", "]", ",", ":", "1", "\\", "NaN", " "])
).map("".join)


@given(st.text(alphabet=st.characters()) | json_like, st.sampled_from([TEXT, OBJECT, LABEL]))
def test_any_text_is_read_without_error(text: str, spec: ParseSpec) -> None:
    answer = parse_answer(text, spec)

    assert answer.value is None or answer.value.encode() is not None


@pytest.mark.parametrize("text", ["{" * 5_000, '{"a":' * 5_000, '{"a": ' + "9" * 5_000 + "}"])
def test_text_that_exhausts_a_json_parser_has_no_answer(text: str) -> None:
    assert parse_answer(text, LABEL).value is None


@few
@given(st.text(), json_objects, st.text())
def test_first_object_is_found_inside_other_text(
    before: str, value: dict[str, object], after: str
) -> None:
    text = before.replace("{", "(") + json.dumps(value) + after

    assert first_object(text) == value


@few
@given(json_objects)
def test_an_object_alone_is_valid_json(value: dict[str, object]) -> None:
    assert parse_answer(f"  {json.dumps(value)}\n", OBJECT).is_valid_json


@few
@given(json_objects, st.randoms())
def test_whole_objects_compare_equal_whatever_the_order_of_keys(
    value: dict[str, object], random: object
) -> None:
    keys = list(value)
    random.shuffle(keys)  # type: ignore[attr-defined]
    shuffled = {key: value[key] for key in keys}

    assert (
        parse_answer(json.dumps(value), OBJECT).value
        == parse_answer(json.dumps(shuffled), OBJECT).value
    )


@given(st.text(), st.sampled_from(["", " ", " \n\n "]))
def test_prefix_makes_no_difference_to_the_answer(rest: str, space: str) -> None:
    spec = ParseSpec(drop_prefix="Here it is:")

    assert parse_answer("Here it is:" + space + rest, spec).value == rest.strip()


@pytest.mark.parametrize(
    ("text", "value", "is_valid"),
    [
        ('{"label": "yes"}', "yes", True),
        ('{"label": " yes "}', "yes", True),
        ('Sure! {"label": "yes"} Anything else?', "yes", False),
        ('{"label": "yes"', None, False),
        ('{"thought": {"label": "no"}, "label": "yes"}', "yes", True),
        ('{"thought": "x", "inner": {"label": "no"}', "no", False),
        ('{"label": "no", "label": "yes"}', "yes", True),
        ('{"label": "no"} {"label": "yes"}', "no", False),
        ('{"other": "yes"}', None, True),
        ('{"label": null}', None, True),
        ('{"label": true}', "true", True),
        ('{"label": 1}', "1", True),
        ('{"label": 1.0}', "1.0", True),
        ('{"label": ["b", "a"]}', '["b","a"]', True),
        ('{"label": NaN}', None, False),
        ('[{"label": "yes"}]', "yes", False),
        ('"label"', None, False),
        ("", None, False),
    ],
)
def test_label_of_first_object(text: str, value: str | None, is_valid: bool) -> None:
    answer = parse_answer(text, LABEL)

    assert (answer.value, answer.is_valid_json) == (value, is_valid)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Here it is: \n\n Halló heimur", "Halló heimur"),
        ("  Here it is:Halló", "Halló"),
        ("here it is: Halló", "here it is: Halló"),
        ("Halló. Here it is: again", "Halló. Here it is: again"),
        ("Here it is:", ""),
    ],
)
def test_constant_prefix_is_dropped_once_at_the_beginning(text: str, value: str) -> None:
    assert parse_answer(text, ParseSpec(drop_prefix="Here it is: \n\n ")).value == value


def test_half_of_a_surrogate_pair_becomes_a_replacement_character() -> None:
    assert parse_answer('{"label": "\\ud800"}', LABEL).value == "\ufffd"


def test_value_of_null_is_none() -> None:
    assert value_text(None) is None
