import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.curation import curate
from tell_core.data.filters import Batch, copied, other_language, repetition, symbols
from tell_core.data.words import hash_words
from tell_core.errors import DataError

from .test_near_duplicates import long_text
from .worlds import general_rows, make_spec, write_rows, write_world

ICELANDIC = (
    "Sérfræðingur á sóttvarnasviði hjá landlæknisembættinu segir of snemmt að fullyrða um aðra"
    " bylgju faraldursins og þrjú ný smit greindust á veirufræðideild spítalans í gær"
)
GOOD = {"prompt": "tell me something", "response": "a plain answer of a few words"}


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    return tmp_path


def batch(*pairs: tuple[str, str]) -> Batch:
    prompts, responses = zip(*pairs, strict=True)
    return Batch(prompts, responses, hash_words([text for pair in pairs for text in pair]))


def _rejects(world, tokenizer, rows, **curation):
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), GOOD, *rows])
    settings = {"max_tokens": 4000, "general_heldout_examples": 8} | curation
    profile = curate(make_spec(world, curation=settings), tokenizer, world / "out")
    for source in profile["sources"]:
        assert source["num_read"] == source["num_kept"] + sum(source["rejects"].values())
    return pq.read_table(world / "out" / "rejects.parquet").to_pylist()


@pytest.mark.parametrize(
    ("curation", "response", "reason", "value"),
    [
        ({"max_repetition": 0.5}, "ba ko mi tu se " * 20, "repetition", 91 / 96),
        ({"max_symbols": 0.4}, "-=- " * 30 + "words", "symbols", 90 / 95),
        ({"max_copied": 0.8}, long_text(0), "copies_prompt", 1.0),
        ({"drop_refusals": True}, "I'm sorry, but I cannot help with that.", "refusal", 1.0),
        ({"drop_refusals": True}, "As an AI language model, I have no taste.", "refusal", 1.0),
        ({"drop_boilerplate": True}, "Click here to read on.", "boilerplate", 1.0),
    ],
)
def test_filter_sets_aside_with_the_measured_value(
    world, tokenizer, curation, response, reason, value
):
    rejects = _rejects(
        world, tokenizer, [{"prompt": long_text(0), "response": response}], **curation
    )

    (row,) = rejects
    assert (row["source"], row["line"], row["reason"]) == ("chat", 32, reason)
    assert row["value"] == pytest.approx(value)
    assert f"{value:.3g}, at most" in row["detail"]


def test_language_filter_sets_aside_with_the_measured_value(world, tokenizer):
    pytest.importorskip("py3langid")
    rows = [{"prompt": ICELANDIC, "response": "já"}]

    (row,) = _rejects(world, tokenizer, rows, languages=["en"])

    assert (row["line"], row["reason"]) == (32, "language")
    assert row["value"] > 0.5


def test_filters_are_off_by_default(world, tokenizer):
    rows = [
        {"prompt": long_text(0), "response": response}
        for response in ("ba ko mi tu se " * 20, "-=- " * 30, long_text(0), "I'm sorry, I cannot")
    ]

    assert _rejects(world, tokenizer, rows) == []


def test_value_stands_beside_other_reasons_too(world, tokenizer):
    rows = [{"prompt": "long", "response": "word " * 300}]

    (row,) = _rejects(world, tokenizer, rows, max_tokens=200)

    assert row["reason"] == "too_long"
    assert row["detail"].startswith(f"{row['value']:.0f} tokens")


words = st.lists(st.sampled_from(["ba", "ko", "mi"]), min_size=1, max_size=60).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_measures_are_shares_or_unknown(pairs):
    for measure in (repetition, copied, symbols):
        values = measure(batch(*pairs))

        assert values.shape == (len(pairs),)
        assert np.all(np.isnan(values) | ((values >= 0) & (values <= 1)))


@given(st.integers(0, 50))
def test_response_of_different_words_repeats_nothing(num_words):
    response = " ".join(f"word{number}" for number in range(num_words))

    (value,) = repetition(batch(("prompt", response)))

    assert value == 0 if num_words >= 24 else np.isnan(value)


def test_missing_language_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)

    with pytest.raises(DataError, match=r"needs the package py3langid.*tell\[language\]"):
        other_language(["en"])


def test_language_is_told_of_texts_that_are_long_enough():
    pytest.importorskip("py3langid")
    english = (
        "An expert at the department of disease prevention believes it is too early to declare"
        " another wave of the pandemic and three new infections were found yesterday"
    )

    values = other_language(["en"])(batch((ICELANDIC, ""), (english, ""), ("stutt", "")))

    assert values[0] > 0.9
    assert values[1] < 0.1
    assert np.isnan(values[2])


def test_unknown_language_names_the_known_ones():
    pytest.importorskip("py3langid")

    with pytest.raises(DataError, match=r"'english' is not known; needed are ISO 639-1.*\ben\b"):
        other_language(["english"])
