import pytest

from tell_core.data.curation import curate
from tell_core.data.evidence import EVIDENCE_KINDS, evidence_rows
from tell_core.errors import InputError

from .test_near_duplicates import long_text
from .worlds import general_rows, make_spec, task_rows, write_rows, write_world


@pytest.fixture
def curated(tmp_path, tokenizer):
    """A corpus with a copy, a near-duplicate, two bad rows and the prompt of a test item."""
    write_world(tmp_path)
    text = long_text(0)
    rows = [
        *general_rows(20, "chat"),
        {"prompt": text, "response": "one"},
        {"prompt": f"{text} indeed", "response": "one"},
        {"prompt": "no answer", "response": ""},
        *general_rows(1, "chat"),
        {"prompt": task_rows(1, start=10_000)[0]["prompt"], "response": "leak"},
    ]
    write_rows(tmp_path / "chat.jsonl", rows)
    write_rows(tmp_path / "general.jsonl", [*general_rows(30), {"prompt": "x", "response": ""}])
    settings = {"max_tokens": 4000, "general_heldout_examples": 8}
    curate(make_spec(tmp_path, curation=settings), tokenizer, tmp_path / "out")
    return tmp_path / "out"


def test_rejects_are_all_there_in_order(curated):
    rows, num_rows = evidence_rows(curated, "rejects")

    assert num_rows == len(rows) == 5
    assert [(row["source"], row["line"], row["reason"]) for row in rows] == [
        ("general", 31, "empty_response"),
        ("chat", 22, "near_duplicate"),
        ("chat", 23, "empty_response"),
        ("chat", 24, "duplicate"),
        ("chat", 25, "test_overlap"),
    ]


def test_duplicates_show_both_texts_and_the_place_of_the_one_that_stayed(curated):
    rows, _ = evidence_rows(curated, "duplicates")

    copy, near = sorted(rows, key=lambda row: row["reason"])
    assert copy["text"] == copy["kept_text"] == "chat question 0"
    assert copy["kept"].endswith("chat.jsonl, line 1")
    assert near["kept"].endswith("chat.jsonl, line 21")
    assert near["text"] != near["kept_text"]
    assert 0.8 <= near["similarity"] < 1


def test_overlap_shows_both_texts(curated):
    (row,), _ = evidence_rows(curated, "overlap")

    assert (row["against"], row["reason"], row["dropped"]) == ("task_test", "prompt", True)
    assert row["matched"] == "test, line 1"
    assert "leak" in row["text"] and "answer 10000" in row["matched_text"]


def test_flagged_rows_tell_how_many_runs_they_share(tmp_path, tokenizer):
    write_world(tmp_path)
    answer = long_text(3)
    item = task_rows(1, start=20_000)[0] | {"response": answer}
    write_rows(tmp_path / "test.jsonl", [*task_rows(12, start=10_000), item])
    rows = [*general_rows(40), {"prompt": "Tell me something else", "response": answer}]
    write_rows(tmp_path / "general.jsonl", rows)
    curate(make_spec(tmp_path, curation={"max_tokens": 4000}), tokenizer, tmp_path / "out")

    (row,), _ = evidence_rows(tmp_path / "out", "overlap")

    assert (row["reason"], row["dropped"], row["share"]) == ("flagged", False, 0.0)
    assert row["runs"] > len(answer.split()) - 13


def test_limit_per_reason_takes_a_row_of_each_source_first(curated):
    rows, num_rows = evidence_rows(curated, "rejects", 2, per_reason=True)

    empty = [row["source"] for row in rows if row["reason"] == "empty_response"]
    assert (sorted(empty), num_rows) == (["chat", "general"], 5)
    assert len(evidence_rows(curated, "rejects", 1, per_reason=True)[0]) == 4


def test_limit_takes_the_first_rows_and_tells_how_many_there_are(curated):
    rows, num_rows = evidence_rows(curated, "rejects", 2)

    assert (len(rows), num_rows) == (2, 5)


def test_unknown_kind_names_the_known_ones(curated):
    with pytest.raises(InputError, match=", ".join(EVIDENCE_KINDS)):
        evidence_rows(curated, "everything")
