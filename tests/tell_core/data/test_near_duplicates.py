import random

import pyarrow.parquet as pq
import pytest

from tell_core.data.curation import curate

from .worlds import PREFIX, general_rows, make_spec, task_rows, write_rows, write_world

WORDS = [
    f"{first}{last}" for first in ("ba", "ko", "mi", "tu", "se") for last in ("la", "rin", "do")
]


def long_text(seed: int, num_words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def with_word(text: str, place: int, word: str = "other") -> str:
    words = text.split()
    words[place] = word
    return " ".join(words)


def chat_row(text: str, response: str = "yes") -> dict[str, str]:
    return {"prompt": text, "response": response}


def task_row(text: str, response: str = "answer") -> dict[str, object]:
    return {"prompt": PREFIX + text, "response": response, "anchor_len": len(PREFIX)}


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    return tmp_path


def _curate(world, tokenizer, **curation):
    settings = {"max_tokens": 2000, "general_heldout_examples": 8} | curation
    profile = curate(make_spec(world, curation=settings), tokenizer, world / "out")
    for source in profile["sources"]:
        assert source["num_read"] == source["num_kept"] + sum(source["rejects"].values())
    return {
        name: pq.read_table(world / "out" / f"{name}.parquet").to_pylist()
        for name in ("near_duplicates", "overlap", "rejects", "general", "task_train")
    }


def _places(rows):
    return [
        (row["source"], row["line"], row["kept_source"], row["kept_line"], row["dropped"])
        for row in rows
    ]


def test_within_and_across_general_sources_the_first_stays(world, tokenizer):
    text = long_text(0)
    write_rows(world / "general.jsonl", [*general_rows(30), chat_row(text)])
    twins = [chat_row(with_word(text, 30)), chat_row(with_word(text, 50))]
    write_rows(world / "chat.jsonl", [*twins, *general_rows(30, "chat")])

    tables = _curate(world, tokenizer)

    found = tables["near_duplicates"]
    assert _places(found) == [("chat", 1, "general", 31, True), ("chat", 2, "general", 31, True)]
    assert [row["cluster"] for row in found] == [1, 1]
    assert found[0]["text"] == with_word(text, 30) + "\nyes"
    assert found[0]["kept_text"] == text + "\nyes"
    assert [row["reason"] for row in tables["rejects"]] == ["near_duplicate"] * 2
    assert tables["rejects"][0]["detail"] == (
        f"similarity {found[0]['similarity']:.2f} to {world / 'general.jsonl'}, line 31"
    )
    assert tables["overlap"] == []


def test_similarity_is_the_jaccard_index_of_runs_of_five_words(world, tokenizer):
    text = " ".join(f"word{number}" for number in range(61))
    rows = [chat_row(text), chat_row(with_word(text, 30))]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    tables = _curate(world, tokenizer)

    # 62 words with the response hold 58 runs; a word in the middle stands in 5 of them.
    assert tables["near_duplicates"][0]["similarity"] == pytest.approx(53 / 63)


def test_task_examples_are_compared_without_their_constant_beginning(world, tokenizer):
    prefix = long_text(1, 120) + "\n"
    train = [
        {"prompt": f"{prefix}{long_text(seed, 30)}", "response": f"{seed}"}
        for seed in range(100, 130)
    ]
    test = [{"prompt": f"{prefix}{long_text(7, 30)}", "response": "x"}]
    write_rows(world / "train.jsonl", train)
    write_rows(world / "test.jsonl", test)

    out = world / "out"
    curation = {"max_tokens": 2000, "general_heldout_examples": 8}
    curate(make_spec(world, anchor={}, curation=curation), tokenizer, out)

    assert pq.read_table(out / "near_duplicates.parquet").num_rows == 0


@pytest.mark.parametrize("drop", [True, False])
def test_near_duplicates_of_test_items_leave_training_and_are_listed_as_overlap(
    world, tokenizer, drop
):
    text = long_text(2)
    write_rows(world / "test.jsonl", [*task_rows(5, start=10_000), task_row(text)])
    leaks = [task_row(with_word(text, 20), "another answer"), *task_rows(30)]
    write_rows(world / "train.jsonl", leaks)
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), chat_row(with_word(text, 40))])

    tables = _curate(world, tokenizer, drop_overlap=drop)

    expected = [("train", 1, "test", 6, drop), ("chat", 31, "test", 6, drop)]
    assert _places(tables["near_duplicates"]) == expected
    overlap = [
        (row["source"], row["line"], row["matched_line"], row["matched"], row["dropped"])
        for row in tables["overlap"]
    ]
    assert overlap == [
        ("train", 1, 6, "near_duplicate", drop),
        ("chat", 31, 6, "near_duplicate", drop),
    ]
    assert [row["reason"] for row in tables["rejects"]] == ["test_overlap"] * (2 * drop)


def test_training_examples_near_a_carved_dev_item_leave(world, tokenizer):
    # Alike prompts with other answers both stay until one of them becomes a dev item.
    rows = []
    for seed in range(20):
        text = long_text(200 + seed)
        rows += [task_row(text, "yes"), task_row(with_word(text, 30), "no")]
    write_rows(world / "train.jsonl", rows)

    tables = _curate(world, tokenizer)

    dev = pq.read_table(world / "out" / "task_dev.parquet").to_pylist()
    twins = {row["line"] + (1 if row["line"] % 2 else -1) for row in dev}
    lines = {row["line"] for row in tables["task_train"]}
    assert len(dev) == 8
    assert not lines & twins
    assert {row["reason"] for row in tables["rejects"]} == {"dev_overlap"}


def test_other_answers_to_alike_prompts_both_stay_in_training(world, tokenizer):
    text = long_text(3)
    rows = [chat_row(text, "yes"), chat_row(with_word(text, 30), "no")]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    assert _curate(world, tokenizer)["near_duplicates"] == []


def test_another_question_about_the_same_text_is_another_example(world, tokenizer):
    passage = long_text(4, 150)
    rows = [
        chat_row(f"{passage} Who came to the house that night?"),
        chat_row(f"{passage} Where did both of them go after dinner?"),
    ]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    assert _curate(world, tokenizer)["near_duplicates"] == []


def test_fillings_of_a_template_are_not_near_duplicates(world, tokenizer):
    template = long_text(5, 100)
    rows = [chat_row(f"{template} {long_text(1000 + seed, 12)}") for seed in range(60)]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    assert _curate(world, tokenizer)["near_duplicates"] == []


def test_short_texts_are_left_to_exact_matching(world, tokenizer):
    rows = [chat_row("copy: abc def"), chat_row("copy: abc deg"), chat_row("Copy: abc def!")]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    tables = _curate(world, tokenizer)

    assert tables["near_duplicates"] == tables["rejects"] == []


def test_other_turns_before_the_same_prompt_make_another_example(world, tokenizer):
    rows = [
        {
            "messages": [
                {"role": "user", "content": long_text(seed)},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": long_text(6)},
                {"role": "assistant", "content": long_text(7)},
            ]
        }
        for seed in (8, 9)
    ]
    filler = [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": f"reply {number}"},
            ]
        }
        for number in range(20)
    ]
    write_rows(world / "chat.jsonl", [*rows, *filler])

    assert _curate(world, tokenizer)["near_duplicates"] == []


def test_nothing_is_compared_when_switched_off(world, tokenizer):
    text = long_text(10)
    rows = [chat_row(text), chat_row(with_word(text, 30))]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    tables = _curate(world, tokenizer, near_duplicate_similarity=None)

    assert tables["near_duplicates"] == tables["rejects"] == []


def test_near_duplicates_are_listed_but_stay_when_asked(world, tokenizer):
    text = long_text(11)
    rows = [chat_row(text), chat_row(with_word(text, 30))]
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *rows])

    tables = _curate(world, tokenizer, drop_duplicates=False)

    assert _places(tables["near_duplicates"]) == [("chat", 32, "chat", 31, False)]
    assert tables["rejects"] == []
