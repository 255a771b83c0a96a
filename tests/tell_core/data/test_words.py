import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.words import WordStore, hash_words, joined, text_digests

ascii_texts = st.text(st.sampled_from("abC1 .,\n-"), max_size=40)
any_texts = st.text(st.characters(codec="utf-8"), max_size=40)


@given(st.lists(ascii_texts, min_size=1, max_size=6))
def test_words_are_equal_where_the_regular_expression_finds_equal_words(texts):
    words = hash_words(texts)

    expected = [re.findall(r"[a-z0-9]+", text.lower()) for text in texts]
    assert np.diff(words.offsets).tolist() == [len(found) for found in expected]
    flat = [word for found in expected for word in found]
    pairs = set(zip(flat, words.hashes.tolist(), strict=True))
    assert len(pairs) == len(set(flat)) == len(set(words.hashes.tolist()))


@given(st.lists(any_texts, min_size=1, max_size=5))
def test_words_of_a_text_do_not_depend_on_its_neighbours(texts):
    together = hash_words(texts)

    for place, text in enumerate(texts):
        assert together.of(place).tolist() == hash_words([text]).hashes.tolist()


def test_scripts_without_spaces_give_a_word_per_character():
    assert len(hash_words(["日本語 text กข"]).hashes) == 6


def test_case_and_compatible_characters_make_no_difference():
    words = hash_words(["STRASSE ﬁne Ⅳ", "Straße fine iv"])

    assert words.offsets.tolist() == [0, 3, 6]
    assert words.of(0).tolist() == words.of(1).tolist()


@given(st.lists(st.tuples(any_texts, any_texts), max_size=8), st.integers(1, 5))
def test_store_gives_back_the_words_of_prompts_and_responses(tmp_path_factory, pairs, batch_rows):
    store = WordStore(tmp_path_factory.mktemp("words") / "words.bin")
    for start in range(0, len(pairs), 3):
        some = pairs[start : start + 3]
        store.append([prompt for prompt, _ in some], [response for _, response in some])
    store.seal()

    expected = hash_words([text for pair in pairs for text in pair] or [""])
    batches = list(store.batches(batch_rows))
    assert np.concatenate([np.empty(0, np.uint64), *(b.hashes for b in batches)]).tolist() == (
        expected.hashes.tolist()
    )
    assert store.num_examples == len(pairs)
    rows = np.arange(len(pairs))[::-1]
    taken = store.take(rows)
    for place, row in enumerate(rows):
        for side in (0, 1):
            assert taken.of(2 * place + side).tolist() == expected.of(2 * row + side).tolist()


@given(any_texts, any_texts)
def test_digests_are_equal_for_the_same_words_only(first, second):
    words = hash_words([first, second, first + " !"])

    digests = text_digests(words)

    same = words.of(0).tolist() == words.of(1).tolist()
    assert (digests[0] == digests[1]) == same
    assert digests[0] == digests[2]


def test_joined_texts_run_from_prompt_into_response():
    words = joined(hash_words(["a b", "c", "d", ""]))

    assert words.offsets.tolist() == [0, 3, 4]
