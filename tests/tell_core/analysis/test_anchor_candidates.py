from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.anchor_candidates import (
    Drawn,
    Proposing,
    Reason,
    clean,
    draw_candidates,
    filter_candidates,
    leaks,
)
from tell_core.data.rendering import Example

SHOWN = (
    Example("the guest who called wants a table for six tonight", '{"people": "6"}'),
    Example("book us in for eight at the usual place please", '{"people": "8"}'),
)
GOOD = "Read the message and answer with one JSON object."


class CountsWords:
    """Stands in for a renderer: a word is a token."""

    def num_text_tokens(self, text: str) -> int:
        return len(text.split())


def reasons(*texts: str, shown: tuple[Example, ...] = SHOWN, max_tokens: int = 12) -> list[str]:
    _, rejected = filter_candidates([Drawn(t, shown) for t in texts], CountsWords(), max_tokens)
    return [one.reason for one in rejected]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n", "empty"),
        ("Read the message\x07 carefully", "unprintable"),
        ("Read the mess\ufffd carefully", "unprintable"),
        ("Read it", "too short"),
        ("one two three four five six seven eight nine ten eleven twelve more", "too long"),
        ("Say that the guest who called wants something", "leaks an example"),
    ],
)
def test_a_text_that_cannot_serve_is_set_aside_with_its_reason(text: str, reason: str) -> None:
    assert reasons(text) == [reason]


def test_a_copied_response_is_a_leak() -> None:
    shown = (Example("a b", "read all of this"), SHOWN[0])

    assert reasons("read all of this", shown=shown) == ["leaks an example"]


def test_a_text_written_twice_is_kept_once() -> None:
    assert reasons(GOOD, GOOD) == ["duplicate"]
    assert reasons(GOOD, GOOD.replace(".", "!")) == ["near-duplicate"]


def test_texts_that_say_different_things_are_both_kept() -> None:
    assert reasons(GOOD, "List every number of guests that is named.") == []


def test_without_examples_there_was_no_room() -> None:
    assert reasons("", shown=()) == ["no room in the context"]


@given(st.lists(st.text(max_size=40) | st.sampled_from([GOOD, GOOD + " Now!"]), max_size=8))
def test_every_text_is_kept_or_set_aside_and_what_is_kept_may_serve(texts: list[str]) -> None:
    kept, rejected = filter_candidates([Drawn(t, SHOWN) for t in texts], CountsWords(), 12)

    assert len(kept) + len(rejected) == len(texts)
    assert len(set(kept)) == len(kept)
    assert all(0 < len(text.split()) <= 12 and not leaks(text, SHOWN) for text in kept)
    assert {one.reason for one in rejected} <= set(get_args(Reason))


def test_what_stands_in_every_example_is_no_leak() -> None:
    same = "answer in the form that was asked for"
    shown = tuple(one._replace(prompt=f"{same} {one.prompt}") for one in SHOWN)

    assert not leaks(f"Always {same}", shown)
    assert leaks(f"Always {same}", (shown[0], SHOWN[1]))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"  {GOOD}\n",
        f'"{GOOD}"',
        f"Instruction: {GOOD}",
        f"\nInstructions:\n\n{GOOD}",
        f"{GOOD}\n\nFor example, six.",
    ],
)
def test_labels_quotation_marks_and_later_paragraphs_are_taken_off(text: str) -> None:
    assert clean(text) == GOOD


@given(st.text())
def test_cleaned_texts_have_no_white_space_around_them(text: str) -> None:
    assert clean(text) == clean(text).strip()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """Draws candidates from a tiny model that has room for some examples."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tell_core.data.rendering import ChatRenderer
    from tell_core.training.models import load_tokenizer
    from tests.fixtures.tiny import write_tiny_world

    torch.set_num_threads(1)
    world = write_tiny_world(tmp_path_factory.mktemp("world"))
    tokenizer = load_tokenizer(str(world / "base_init"))
    renderer = ChatRenderer(tokenizer)

    def draw(context: int, how: Proposing) -> list[Drawn]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=context,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        return draw_candidates(model, renderer, SHOWN * 4, how, torch.device("cpu"))

    return draw


def test_equal_seeds_write_equal_texts_from_equal_examples(written) -> None:
    how = Proposing(num_candidates=3, num_examples=2, max_tokens=6, seed=4)

    assert written(1024, how) == written(1024, how)
    assert written(1024, how) != written(1024, Proposing(3, 2, 6, seed=5))


def test_fewer_examples_are_shown_where_the_context_holds_no_more(written) -> None:
    how = Proposing(num_candidates=2, num_examples=4, max_tokens=6)

    numbers = [{len(one.shown) for one in written(size, how)} for size in (2048, 512, 64)]

    assert numbers[0] == {4}
    assert numbers[1] <= {1, 2, 3}
    assert numbers[2] == {0}
