import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.data.anchors import Anchor, apply_anchor, random_anchor, resolve_anchor
from tell_core.errors import AnchorError, ModelError
from tell_core.spec.model import AnchorSpec
from tell_core.store import write_json

from .tiny_tokenizers import build_tokenizer

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
inked = texts.filter(str.strip)


@given(inked, st.lists(inked, min_size=1, max_size=6))
def test_anchored_prompt_is_the_original_byte_for_byte_with_marked_prefix(prefix, inputs):
    prompts = [prefix + text for text in inputs]

    anchor = resolve_anchor(AnchorSpec(), prompts, [len(prefix)] * len(prompts))

    for prompt in prompts:
        bare = prompt[len(anchor.own_instruction) :]
        assert apply_anchor("anchor", anchor, bare, None) == (None, prompt)
        assert apply_anchor("own", anchor, bare, None) == (None, prompt)


@given(inked, st.lists(inked, min_size=2, max_size=6))
def test_found_prefix_ends_with_white_space_and_leaves_no_prompt_empty(prefix, inputs):
    prompts = [f"{prefix}\n{text}" for text in inputs]

    anchor = resolve_anchor(AnchorSpec(), prompts, None)

    assert anchor.own_instruction[-1].isspace()
    assert all(prompt.startswith(anchor.own_instruction) for prompt in prompts)
    assert all(len(prompt) > len(anchor.own_instruction) for prompt in prompts)


def test_found_prefix_is_cut_back_to_whole_words():
    anchor = resolve_anchor(AnchorSpec(), ["Translate this: dog", "Translate this: door"], None)

    assert anchor.text == "Translate this: "


def test_prompts_without_a_common_beginning_say_what_to_do():
    with pytest.raises(AnchorError, match=r"source: given.*length_column.*source: none"):
        resolve_anchor(AnchorSpec(), ["one", "two"], None)


def test_marked_prefixes_that_differ_are_listed():
    with pytest.raises(AnchorError, match=r"another in row 2, row 3"):
        resolve_anchor(AnchorSpec(), ["ab x", "cd x", "a"], [3, 3, 1])


def test_missing_lengths_are_listed_by_place():
    with pytest.raises(AnchorError, match=r"missing.*f, line 7"):
        resolve_anchor(AnchorSpec(), ["ab", "ab"], [1, None], ["f, line 6", "f, line 7"])


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("before", (None, "Be brief.\n\ndog")),
        ("after", (None, "dog\n\nBe brief.")),
        ("system", ("Be brief.", "dog")),
    ],
)
def test_given_anchor_stands_at_its_position(position, expected):
    anchor = resolve_anchor(
        AnchorSpec(source="given", text="Be brief.", position=position), ["dog"], None
    )

    assert apply_anchor("anchor", anchor, "dog", None) == expected
    assert apply_anchor("own", anchor, "dog", None) == (None, "dog")
    assert apply_anchor("none", anchor, "dog", None) == (None, "dog")


def test_system_position_keeps_the_system_message_of_the_example():
    anchor = Anchor("Anchor.", "system", "")

    assert apply_anchor("anchor", anchor, "dog", "Own.") == ("Own.\n\nAnchor.", "dog")


def test_random_text_takes_the_place_of_the_anchor():
    anchor = Anchor("Anchor. ", "before", "Own: ")

    assert apply_anchor("random", anchor, "dog", None, "blue seven\n") == (None, "blue seven\ndog")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 5))
def test_random_anchor_has_exactly_the_length_asked_for(num_tokens, seed):
    tokenizer = build_tokenizer()

    text = random_anchor(tokenizer, num_tokens, seed)

    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == num_tokens
    assert text == random_anchor(tokenizer, num_tokens, seed)


def test_random_anchors_differ_by_seed(tokenizer):
    assert random_anchor(tokenizer, 20, 0) != random_anchor(tokenizer, 20, 1)


def test_vocabulary_without_words_is_a_clear_error(tokenizer, monkeypatch):
    monkeypatch.setattr("tell_core.data.anchors._stable_words", lambda *_: [])

    with pytest.raises(ModelError, match="no random text of exactly 3 tokens"):
        random_anchor(tokenizer, 3, 0)


def test_anchor_survives_its_file(tmp_path):
    anchor = Anchor("Text\n", "after", "Own ", 5)
    write_json(tmp_path / "anchor.json", anchor.record())

    assert Anchor.load(tmp_path / "anchor.json") == anchor
