import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.curation import curate
from tell_core.data.evidence import evidence_rows
from tell_core.data.words import hash_words

from .worlds import PREFIX, general_rows, make_spec, task_rows, write_rows, write_world

PROMPT = "when will the second new card that i ordered last monday arrive at my house"
WORDS = PROMPT.split()


def _row(words, response):
    return {"prompt": PREFIX + " ".join(words), "response": response, "anchor_len": len(PREFIX)}


def _dropped(world, tokenizer, test, train=(), general=(), **curation):
    """What is set aside as a near-duplicate, by source and line, with the line of the item."""
    write_rows(world / "test.jsonl", [*task_rows(12, start=10_000), *test])
    write_rows(world / "train.jsonl", [*task_rows(60), *train])
    write_rows(world / "chat.jsonl", [*general_rows(20, "chat"), *general])
    settings = {"max_tokens": 400, "general_heldout_examples": 8} | curation
    curate(make_spec(world, curation=settings), tokenizer, world / "out")
    rows, _ = evidence_rows(world / "out", "overlap")
    return [
        (row["source"], row["line"], row["matched"])
        for row in rows
        if row["reason"] == "near_duplicate"
    ]


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    return tmp_path


def test_a_short_prompt_alike_with_the_same_answer_leaves(world, tokenizer):
    item, changed = _row(WORDS, "card arrival"), _row([*WORDS[:-1], "door"], "Card arrival.")
    bare = {"prompt": " ".join([*WORDS[:-1], "flat"]), "response": "CARD ARRIVAL"}

    assert _dropped(world, tokenizer, [item], [changed], [bare]) == [
        ("train", 61, "test, line 13"),
        ("chat", 21, "test, line 13"),
    ]


def test_another_answer_keeps_it(world, tokenizer):
    item, changed = _row(WORDS, "card arrival"), _row([*WORDS[:-1], "door"], "card delivery")

    assert _dropped(world, tokenizer, [item], [changed]) == []


def test_training_examples_alike_among_themselves_stay(world, tokenizer):
    rows = [_row(WORDS, "card arrival"), _row([*WORDS[:-1], "door"], "card arrival")]

    assert _dropped(world, tokenizer, [], rows) == []
    assert evidence_rows(world / "out", "duplicates")[1] == 0


def test_the_same_few_words_with_other_signs_leave(world, tokenizer):
    item, changed = _row(["Bonn", "hotel?"], "city: Bonn"), _row(["bonn,", "hotel"], "City: bonn!")

    assert _dropped(world, tokenizer, [item], [changed]) == [("train", 61, "test, line 13")]


def test_a_template_with_another_filling_stays(world, tokenizer):
    frame = "please say in one word whether the thing that i name here is alive or not:"
    items = [_row([*frame.split(), f"thing{n}"], "no") for n in range(60)]
    changed = _row([*frame.split(), "stone"], "no")

    assert _dropped(world, tokenizer, items, [changed]) == []


def test_without_near_duplicates_none_is_looked_for(world, tokenizer):
    item, changed = _row(WORDS, "card arrival"), _row([*WORDS[:-1], "door"], "card arrival")

    found = _dropped(world, tokenizer, [item], [changed], near_duplicate_similarity=None)

    assert found == []


def test_an_item_alike_by_both_rules_is_listed_once(world, tokenizer):
    answer = " ".join(f"word{n}" for n in range(40))
    item, changed = _row(WORDS, answer), _row([*WORDS[:-1], "house!"], answer)

    assert _dropped(world, tokenizer, [item], [changed]) == [("train", 61, "test, line 13")]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_the_first_and_second_texts_of_pairs_are_all_texts(lengths, data):
    texts = [" ".join(f"w{data.draw(st.integers(0, 5))}" for _ in range(n)) for n in lengths]
    words = hash_words([text for text in texts for _ in range(2)])

    first, second = words.first_of_each_pair(), words.second_of_each_pair()

    assert np.array_equal(first.hashes, second.hashes)
    assert np.array_equal(first.hashes, hash_words(texts).hashes)
    assert np.array_equal(first.offsets, hash_words(texts).offsets)
