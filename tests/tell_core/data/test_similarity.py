import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.shingles import PhraseCounts, shared_sizes, word_shingles
from tell_core.data.similarity import band_shape, has_other_passage, signatures
from tell_core.data.words import hash_words

texts = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


def runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


@given(st.lists(texts, min_size=1, max_size=6), st.integers(1, 4))
def test_shingles_are_the_distinct_runs_of_each_text(some, size):
    sets = word_shingles(hash_words(some), size)

    assert sets.sizes.tolist() == [len(runs(text, size)) for text in some]


@given(st.lists(texts, min_size=2, max_size=6), st.integers(1, 3))
def test_shared_sizes_are_those_of_the_intersections(some, size):
    sets = word_shingles(hash_words(some), size)
    first, second = np.triu_indices(len(some), 1)

    shared = shared_sizes(sets, first, second)

    expected = [
        len(runs(some[a], size) & runs(some[b], size)) for a, b in zip(first, second, strict=True)
    ]
    assert shared.tolist() == expected


def test_many_texts_are_shingled_in_blocks():
    some = [f"word{number} and more" for number in range(5000)]
    sets = word_shingles(hash_words(some), 2)

    shared = shared_sizes(sets, np.arange(4999), np.arange(1, 5000))

    assert sets.sizes.tolist() == [2] * 5000
    assert shared.tolist() == [1] * 4999


def test_common_shingles_are_left_out():
    sets = word_shingles(hash_words(["a b c", "a b d", "a b e"]), 2)
    counts = PhraseCounts(100)
    counts.add(sets)

    assert counts.without_common(sets, 2).sizes.tolist() == [1, 1, 1]
    assert counts.without_common(sets, 3).sizes.tolist() == [2, 2, 2]


@given(st.floats(0.4, 1))
def test_bands_miss_a_pair_at_the_threshold_once_in_ten_thousand(similarity):
    num_bands, width = band_shape(similarity)

    assert num_bands * width <= 160
    assert (1 - min(similarity, 0.999) ** width) ** num_bands <= 1e-4


@pytest.mark.parametrize("shared", [0.5, 0.8, 0.95])
def test_signatures_agree_as_often_as_the_jaccard_similarity(shared):
    num_shared = round(2000 * shared)
    common = [f"c{n}" for n in range(num_shared)]
    texts = [
        " ".join(common + [f"{name}{n}" for n in range((2000 - num_shared) // 2)]) for name in "xy"
    ]

    least = signatures(word_shingles(hash_words(texts), 1), 2000)

    # Standard error sqrt(0.25 / 2000) = 0.011.
    assert np.mean(least[:, 0] == least[:, 1]) == pytest.approx(shared, abs=0.05)


def _words(text):
    return hash_words([text]).hashes


def test_scattered_changes_are_no_other_passage():
    rng = random.Random(0)
    words = [f"w{rng.randrange(50)}" for _ in range(200)]
    changed = [f"new{at}" if at % 12 == 5 else word for at, word in enumerate(words)]

    assert not has_other_passage(_words(" ".join(words)), _words(" ".join(changed)))


def test_sentence_in_place_of_another_is_an_other_passage():
    base = " ".join(f"w{at}" for at in range(100))

    assert has_other_passage(
        _words(base + " who came home at night"), _words(base + " why did he leave so soon")
    )
    assert not has_other_passage(_words(base + " who came home at night"), _words(base))
