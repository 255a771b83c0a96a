import pyarrow.parquet as pq
import pytest

from tell_core.data.curation import curate

from .test_near_duplicates import long_text
from .worlds import PREFIX, general_rows, make_spec, task_rows, write_rows, write_world


@pytest.fixture
def world(tmp_path):
    """Test item 13 has 120 words, of which the first 110 are its prompt."""
    write_world(tmp_path)
    item = {
        "prompt": PREFIX + long_text(0, 110),
        "response": long_text(1, 10),
        "anchor_len": len(PREFIX),
    }
    write_rows(tmp_path / "test.jsonl", [*task_rows(12, start=10_000), item])
    return tmp_path


def _curate(world, tokenizer, rows, **sections):
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])
    settings = {"max_tokens": 4000, "general_heldout_examples": 8}
    sections["curation"] = settings | sections.get("curation", {})
    profile = curate(make_spec(world, **sections), tokenizer, world / "out")
    for source in profile["sources"]:
        assert source["num_read"] == source["num_kept"] + sum(source["rejects"].values())
    return {
        name: pq.read_table(world / "out" / f"{name}.parquet").to_pylist()
        for name in ("overlap", "flagged", "rejects")
    }


def embedded(num_words: int) -> dict[str, str]:
    """A long text with the first words of the test item in the middle of it."""
    piece = " ".join(long_text(0, 110).split()[:num_words])
    return {"prompt": f"{long_text(50, 80)} {piece} {long_text(51, 80)}", "response": "yes"}


def test_example_that_holds_most_of_a_test_item_leaves(world, tokenizer):
    tables = _curate(world, tokenizer, [embedded(80)])

    (row,) = tables["overlap"]
    assert (row["source"], row["line"], row["against"]) == ("chat", 31, "task_test")
    assert (row["matched_line"], row["matched"], row["dropped"]) == (13, "13_grams", True)
    assert long_text(0, 110) in row["matched_text"]
    (reject,) = tables["rejects"]
    # 80 words hold 68 runs of 13 words; 110 of the item's begin in its prompt of 110 words, but
    # the last two would end behind its 120 words.
    assert reject["reason"] == "test_overlap"
    assert reject["detail"].startswith("holds 63 % of the runs of 13 words in the prompt of ")
    assert tables["flagged"] == []


def test_example_that_holds_little_of_a_test_item_is_flagged_and_stays(world, tokenizer):
    tables = _curate(world, tokenizer, [embedded(30)])

    assert tables["overlap"] == tables["rejects"] == []
    (row,) = tables["flagged"]
    assert (row["source"], row["line"], row["matched_line"]) == ("chat", 31, 13)
    assert (row["num_runs"], row["share"]) == (18, pytest.approx(18 / 108))


def test_text_split_over_prompt_and_response_is_found(world, tokenizer):
    words = long_text(0, 110).split()
    rows = [{"prompt": " ".join(words[:50]), "response": " ".join(words[50:])}]

    tables = _curate(world, tokenizer, rows)

    assert [row["matched"] for row in tables["overlap"]] == ["13_grams"]


def test_phrase_that_many_examples_share_is_no_evidence(world, tokenizer):
    rows = [
        {"prompt": f"{embedded(80)['prompt']} {long_text(60 + n, 80)}", "response": f"{n}"}
        for n in range(12)
    ]

    tables = _curate(world, tokenizer, rows, curation={"near_duplicate_similarity": None})

    assert tables["overlap"] == tables["flagged"] == []


def test_retention_items_are_looked_for_too(world, tokenizer):
    retention = [{"prompt": long_text(80, 60), "response": "kept ability"}]
    write_rows(world / "keep.jsonl", retention)
    rows = [{"prompt": f"{long_text(81, 60)} {long_text(80, 60)}", "response": "x"}]

    tables = _curate(world, tokenizer, rows, retention=[str(world / "keep.jsonl")])

    assert [row["reason"] for row in tables["rejects"]] == ["retention_overlap"]


def test_test_items_themselves_always_stay(world, tokenizer):
    item = {
        "prompt": f"{PREFIX}{long_text(0, 110)} once more",
        "response": "other",
        "anchor_len": len(PREFIX),
    }
    write_rows(
        world / "test.jsonl",
        [*task_rows(12, start=10_000), item, item | {"prompt": item["prompt"] + " again"}],
    )

    tables = _curate(world, tokenizer, [])

    assert tables["overlap"] == tables["flagged"] == []
    assert pq.read_metadata(world / "out" / "task_test.parquet").num_rows == 14


def test_response_alone_is_flagged_only(world, tokenizer):
    item = {"prompt": f"{PREFIX}question", "response": long_text(90, 60)}
    write_rows(world / "test.jsonl", [item | {"anchor_len": len(PREFIX)}])
    rows = [{"prompt": "quite another one", "response": long_text(90, 60)}]

    tables = _curate(world, tokenizer, rows)

    assert tables["overlap"] == []
    assert [row["share"] for row in tables["flagged"]] == [0]


@pytest.mark.parametrize(
    "curation",
    [{"drop_overlap": False}, {"overlap_ngram_share": 0.9}, {"overlap_ngram_share": None}],
)
def test_overlap_stays_when_asked(world, tokenizer, curation):
    tables = _curate(world, tokenizer, [embedded(80)], curation=curation)

    assert tables["rejects"] == []
    assert len(tables["overlap"]) == ("drop_overlap" in curation)
    assert len(tables["flagged"]) == (curation.get("overlap_ngram_share") == 0.9)
