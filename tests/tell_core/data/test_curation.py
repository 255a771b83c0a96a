import json
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest

from tell_core.data import curation
from tell_core.data.corpus import Corpus
from tell_core.data.curation import PARTS, curate, curation_inputs, renderer_for
from tell_core.data.rendering import Example
from tell_core.data.telling import telling
from tell_core.data.workspace import MemoryLimitError
from tell_core.errors import AnchorError, DataError
from tell_core.pipeline import curate_stage
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tests.fixtures.tiny import tiny_fields

from .worlds import PREFIX, general_rows, make_spec, task_rows, write_rows, write_world


@pytest.fixture
def world(tmp_path):
    write_world(tmp_path)
    return tmp_path


def _curate(world, tokenizer, **sections):
    out = world / "out"
    profile = curate(make_spec(world, **sections), tokenizer, out)
    tables = {part: pq.read_table(out / f"{part}.parquet").to_pylist() for part in PARTS}
    for name in ("rejects", "overlap"):
        tables[name] = pq.read_table(out / f"{name}.parquet").to_pylist()
    return profile, tables


def _tokens(world, part):
    corpus = Corpus(world / "out" / f"{part}.parquet")
    return corpus.encoded(np.arange(corpus.num_examples), is_task=False)


def _reasons(tables):
    return sorted((row["source"], row["line"], row["reason"]) for row in tables["rejects"])


def test_every_row_read_is_kept_or_set_aside(world, tokenizer):
    with (world / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x"}\nnot json\n')
    write_rows(world / "chat.jsonl", [*general_rows(30, "chat"), *general_rows(5, "chat")])

    profile, tables = _curate(world, tokenizer)

    for source in profile["sources"]:
        assert source["num_read"] == source["num_kept"] + sum(source["rejects"].values())
    num_rows = sum(len(tables[part]) for part in (*PARTS, "rejects"))
    assert num_rows == sum(source["num_read"] for source in profile["sources"])
    assert {row["reason"] for row in tables["rejects"]} == {
        "missing_column",
        "bad_json",
        "duplicate",
    }


def test_corpora_have_the_promised_columns_and_types(world, tokenizer):
    _curate(world, tokenizer)

    for part in PARTS:
        schema = pq.read_schema(world / "out" / f"{part}.parquet")
        assert {field.name: str(field.type) for field in schema} == {
            "row": "int64",
            "source": "string",
            "file": "string",
            "line": "int64",
            "example_id": "string",
            "system": "string",
            "history": "string",
            "prompt": "string",
            "response": "string",
            "extra": "string",
            "num_tokens": "int64",
            "num_response_tokens": "int64",
        }


def test_task_prompts_are_bare_and_the_anchor_is_recorded(world, tokenizer):
    _, tables = _curate(world, tokenizer)

    anchor = read_json(world / "out" / "anchor.json")
    assert anchor["text"] == anchor["own_instruction"] == PREFIX
    assert anchor["num_anchor_tokens"] == len(tokenizer(PREFIX)["input_ids"])
    for part in ("task_train", "task_dev", "task_test"):
        assert all(row["prompt"].startswith("task word") for row in tables[part])


def test_token_counts_are_those_of_the_rendering_without_anchor(world, tokenizer):
    _, tables = _curate(world, tokenizer)

    for part in PARTS:
        examples = _tokens(world, part)
        for index, row in enumerate(tables[part]):
            assert row["num_tokens"] == examples.lengths[index]
            assert row["num_response_tokens"] == examples.supervised_counts[index]
            text = tokenizer.decode(examples.example(index))
            assert text.endswith(
                f"user\n{row['prompt']}<|end|>\n<|start|>assistant\n{row['response']}<|end|>"
            )
            assert PREFIX not in text


def test_duplicates_are_removed_within_the_task_and_across_general_sources(world, tokenizer):
    write_rows(world / "train.jsonl", [*task_rows(30), *task_rows(2)])
    write_rows(world / "chat.jsonl", [*general_rows(20, "chat"), *general_rows(1, "general")])

    _, tables = _curate(world, tokenizer)

    assert _reasons(tables) == [
        ("chat", 21, "duplicate"),
        ("train", 31, "duplicate"),
        ("train", 32, "duplicate"),
    ]


def test_duplicates_stay_when_asked(world, tokenizer):
    write_rows(world / "train.jsonl", [*task_rows(30), *task_rows(2)])

    profile, _ = _curate(
        world, tokenizer, curation={"drop_duplicates": False, "general_heldout_examples": 8}
    )

    assert profile["sources"][0]["num_kept"] == 32


@pytest.fixture
def overlapping(world):
    """Test item 10000 in the training data, 10001 in general data with and without instruction."""
    twin = {"prompt": f"{PREFIX}TASK  word\n10000", "response": "answer 10000", "anchor_len": 33}
    write_rows(world / "train.jsonl", [*task_rows(30), twin | {"anchor_len": len(PREFIX)}])
    test = task_rows(1, start=10_001)[0]
    leaks = [
        {"prompt": test["prompt"].removeprefix(PREFIX), "response": "other"},
        {"prompt": test["prompt"], "response": test["response"].upper()},
    ]
    write_rows(world / "chat.jsonl", [*general_rows(20, "chat"), *leaks])
    return world


def test_overlap_with_the_test_set_is_listed_and_removed(overlapping, tokenizer):
    _, tables = _curate(overlapping, tokenizer)

    found = [
        (row["source"], row["line"], row["matched_source"], row["matched_line"], row["matched"])
        for row in tables["overlap"]
    ]
    assert found == [
        ("train", 31, "test", 1, "prompt_and_response"),
        ("chat", 21, "test", 2, "prompt"),
        ("chat", 22, "test", 2, "prompt_and_response"),
    ]
    assert all(row["dropped"] for row in tables["overlap"])
    assert {row["against"] for row in tables["overlap"]} == {"task_test"}
    assert [reason for _, _, reason in _reasons(tables)] == ["test_overlap"] * 3


def test_overlap_is_listed_but_kept_when_asked(overlapping, tokenizer):
    _, tables = _curate(
        overlapping, tokenizer, curation={"drop_overlap": False, "general_heldout_examples": 8}
    )

    assert [row["dropped"] for row in tables["overlap"]] == [False] * 3
    assert tables["rejects"] == []


@pytest.fixture
def leaking(world):
    """General data with the prompts of task training and dev items, training with one of dev's."""
    train, dev = task_rows(31), task_rows(3, start=500)
    write_rows(world / "train.jsonl", [*train, dev[0] | {"response": "other"}])
    write_rows(world / "dev.jsonl", dev)
    bare = {"prompt": train[30]["prompt"].removeprefix(PREFIX), "response": "other"}
    write_rows(world / "chat.jsonl", [*general_rows(20, "chat"), dev[1], bare, dev[0], train[3]])
    return world


@pytest.mark.parametrize("drop", [True, False])
def test_overlap_with_dev_and_task_is_listed_and_removed_or_kept(leaking, tokenizer, drop):
    task = {"name": "task"} | {
        part: str(leaking / f"{part}.jsonl") for part in ("train", "dev", "test")
    }
    curation = {"drop_overlap": drop, "general_heldout_examples": 8}

    profile, tables = _curate(leaking, tokenizer, task=task, curation=curation)

    columns = ("source", "line", "against", "matched_source", "matched_line", "matched", "dropped")
    assert [tuple(row[name] for name in columns) for row in tables["overlap"]] == [
        ("train", 32, "task_dev", "dev", 1, "prompt", drop),
        ("chat", 21, "task_dev", "dev", 2, "prompt_and_response", drop),
        ("chat", 22, "task_train", "train", 31, "prompt", drop),
        ("chat", 23, "task_dev", "dev", 1, "prompt_and_response", drop),
        ("chat", 24, "task_train", "train", 4, "prompt_and_response", drop),
    ]
    dropped = [
        ("chat", 21, "dev_overlap"),
        ("chat", 22, "task_overlap"),
        ("chat", 23, "dev_overlap"),
        ("chat", 24, "task_overlap"),
        ("train", 32, "dev_overlap"),
    ]
    assert _reasons(tables) == (dropped if drop else [])
    for source in profile["sources"]:
        assert source["num_read"] == source["num_kept"] + sum(source["rejects"].values())


def test_training_examples_with_the_prompt_of_a_carved_dev_item_leave(world, tokenizer):
    twins = [row | {"response": "other"} for row in task_rows(30)]
    write_rows(world / "train.jsonl", [*task_rows(30), *twins])

    profile, tables = _curate(world, tokenizer)

    prompts = {part: {row["prompt"] for row in tables[part]} for part in PARTS}
    assert not prompts["task_train"] & prompts["task_dev"]
    assert len(tables["task_dev"]) == 8
    assert {(row["against"], row["matched_source"]) for row in tables["overlap"]} == {
        ("task_dev", "train")
    }
    assert profile["sources"][0]["num_kept"] + len(tables["overlap"]) == 60


def test_an_item_cut_elsewhere_into_prompt_and_response_is_found(world, tokenizer):
    rows = [_cut_elsewhere(row) for row in task_rows(4, start=10_001)]
    of_train, bare, with_instruction, other = rows
    write_rows(world / "train.jsonl", [*task_rows(60), of_train])
    bare["prompt"] = bare["prompt"].removeprefix(PREFIX)
    other["response"] += " and more"
    write_rows(world / "chat.jsonl", [*general_rows(20), bare, with_instruction, other])

    _, tables = _curate(world, tokenizer)

    columns = ("source", "line", "matched", "matched_line")
    assert [tuple(row[name] for name in columns) for row in tables["overlap"]] == [
        ("train", 61, "same_text", 2),
        ("chat", 21, "same_text", 3),
        ("chat", 22, "same_text", 4),
    ]


def _cut_elsewhere(row):
    """The same text, but only the first three words after the instruction are the prompt."""
    *words, rest = row["prompt"].removeprefix(PREFIX).split(" ", 3)
    response = f"{rest.upper()}\n{row['response']}"
    return row | {"prompt": PREFIX + " ".join(words), "response": response}


def test_overlap_names_the_test_item_whose_response_is_the_same(world, tokenizer):
    test = task_rows(1, start=10_000)[0]
    write_rows(world / "test.jsonl", [test | {"response": "something else"}, test])
    write_rows(world / "train.jsonl", [*task_rows(30), test])

    _, tables = _curate(world, tokenizer)

    found = [(row["matched_line"], row["matched"]) for row in tables["overlap"]]
    assert found == [(2, "prompt_and_response")]


def test_too_long_counts_task_examples_as_rendered_with_the_anchor(world, tokenizer):
    anchor = {"position": "system", "length_column": "anchor_len"}
    spec = make_spec(world, anchor=anchor)
    longest = max(
        len(ids)
        for ids, _ in renderer_for(spec, tokenizer).encode(
            [
                Example(row["prompt"][len(PREFIX) :], row["response"], PREFIX)
                for row in task_rows(60)
            ]
        )
    )

    for limit, expected in ((longest, 0), (longest - 1, 1)):
        curation = {"max_tokens": limit}
        profile, _ = _curate(
            world, tokenizer, anchor=anchor, curation=curation, general=[], arms=["sft"]
        )
        assert (profile["sources"][0]["rejects"].get("too_long", 0) > 0) == expected


def test_too_long_counts_the_anchor(world, tokenizer):
    _, tables = _curate(world, tokenizer)
    longest = max(row["num_tokens"] for row in tables["task_train"] + tables["task_dev"])
    anchor = read_json(world / "out" / "anchor.json")["num_anchor_tokens"]

    _, tables = _curate(
        world,
        tokenizer,
        curation={"max_tokens": longest + anchor - 1, "general_heldout_examples": 8},
    )

    too_long = [row for row in tables["rejects"] if row["reason"] == "too_long"]
    assert {row["source"] for row in too_long} >= {"train"}
    assert all(row["num_tokens"] + anchor < longest + anchor for row in tables["task_train"])


def test_dev_and_heldout_are_carved_out_by_seed(world, tokenizer):
    _, first = _curate(world, tokenizer)
    _, again = _curate(world, tokenizer)
    _, other = _curate(
        world, tokenizer, curation={"seed": 1, "general_heldout_examples": 8, "max_tokens": 400}
    )

    for part in ("task_dev", "general_heldout"):
        assert len(first[part]) == 8
        assert first[part] == again[part]
        assert first[part] != other[part]
    ids = {row["example_id"] for row in first["task_train"]}
    assert not ids & {row["example_id"] for row in first["task_dev"]}


def test_dev_source_is_used_as_given(world, tokenizer):
    write_rows(world / "dev.jsonl", task_rows(5, start=500))
    task = {"name": "task"} | {
        part: str(world / f"{part}.jsonl") for part in ("train", "dev", "test")
    }

    profile, tables = _curate(world, tokenizer, task=task)

    assert len(tables["task_dev"]) == 5
    assert len(tables["task_train"]) == 60
    assert [source["role"] for source in profile["sources"]][:3] == [
        "task_train",
        "task_dev",
        "task_test",
    ]


def test_outputs_are_byte_identical_when_repeated(world, tokenizer):
    _curate(world, tokenizer)
    before = {path.name: path.read_bytes() for path in (world / "out").iterdir()}

    _curate(world, tokenizer)

    assert before == {path.name: path.read_bytes() for path in (world / "out").iterdir()}


def test_experiment_without_general_data_has_empty_general_corpora(world, tokenizer):
    profile, tables = _curate(
        world, tokenizer, general=[], arms=["base", "sft"], budgets={"task_tokens": 600}
    )

    assert tables["general"] == tables["general_heldout"] == []
    assert [source["role"] for source in profile["sources"]] == ["task_train", "task_test"]


def test_profile_says_what_was_decided_and_measured(world, tokenizer):
    profile, tables = _curate(world, tokenizer)

    train = profile["sources"][0]
    lengths = [row["num_tokens"] for row in tables["task_train"] + tables["task_dev"]]
    assert (train["format_given"], train["format"]) == ("auto", "prompt_response")
    assert train["num_tokens"] == sum(lengths)
    assert train["tokens_max"] == max(lengths)
    assert sum(train["histogram"]["counts"]) == len(lengths)
    assert len(train["histogram"]["edges"]) == len(train["histogram"]["counts"]) + 1
    assert len(train["files"][0]["sha256"]) == 64


def test_anchor_longer_than_the_limit_is_a_clear_error(world, tokenizer):
    with pytest.raises(AnchorError, match=r"anchor prompt has \d+ tokens.*max_tokens` is 5"):
        _curate(world, tokenizer, curation={"max_tokens": 5})


def test_no_example_within_the_limit_is_a_clear_error(world, tokenizer):
    with pytest.raises(DataError, match=r"task\.train: no example is left.*too_long 60"):
        _curate(world, tokenizer, curation={"max_tokens": 40})


def test_too_few_examples_for_dev_is_a_clear_error(world, tokenizer):
    write_rows(world / "train.jsonl", task_rows(8))

    with pytest.raises(DataError, match=r"task_train has 8 examples.*lower `task\.dev_examples`"):
        _curate(world, tokenizer)


def test_row_that_is_all_prefix_is_set_aside(world, tokenizer):
    rows = [*task_rows(30), {"prompt": PREFIX, "response": "x", "anchor_len": len(PREFIX)}]
    write_rows(world / "train.jsonl", rows)

    _, tables = _curate(world, tokenizer)

    assert _reasons(tables) == [("train", 31, "empty_prompt")]


def test_length_column_that_is_not_there_names_the_rows(world, tokenizer):
    with pytest.raises(AnchorError, match=r"length_column.*train\.jsonl, line 1"):
        _curate(world, tokenizer, anchor={"length_column": "prefix_len"})


def test_conversations_are_curated_with_their_history(world, tokenizer):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = [
        {"messages": [*messages[:-1], {"role": "assistant", "content": f"{n}"}]} for n in range(20)
    ]
    write_rows(world / "chat.jsonl", rows)

    _, tables = _curate(world, tokenizer)

    at, row = next((at, row) for at, row in enumerate(tables["general"]) if row["source"] == "chat")
    assert json.loads(row["history"]) == messages[:2]
    assert "one<|end|>" in tokenizer.decode(_tokens(world, "general").example(at))


def test_every_step_tells_of_itself_and_none_goes_back(world, tokenizer):
    calls = []
    spec = make_spec(world, curation={"max_repetition": 0.9})

    curate(spec, tokenizer, world / "out", lambda *call: calls.append(call))

    assert [step for step, _ in groupby(step.split(",")[0] for step, _, _ in calls)] == [
        *(f"{verb} {name}" for name in ("train", "test", "general", "chat")
          for verb in ("read", "check")),
        "identify",
        "filter",
        "copies",
        "index prompts",
        "same prompts",
        "encode",
        "index words",
        "count runs of 5 words",
        "sketch",
        "join candidates",
        "short items",
        "near-duplicates",
        "count runs of 13 words",
        "pieces of test items",
        "hold out",
        "write",
        "write tokens",
        "profile",
    ]  # fmt: skip
    assert all(0 <= done <= total for _, done, total in calls)
    for _, some in groupby(calls, lambda call: call[0]):
        numbers = [done for _, done, _ in some]
        assert numbers == sorted(numbers)


def test_a_long_statement_is_told_of_while_it_runs(world, tokenizer, monkeypatch):
    calls = []
    identify = curation._identify

    def slowly(connection):
        """As long as it takes until the step was told of four times."""
        connection.execute("set progress_bar_time = 1")
        while sum(step == "identify" for step, _, _ in calls) < 4:
            connection.execute("select count(distinct sha256(i::varchar)) from range(300000) t(i)")
        identify(connection)

    monkeypatch.setattr(curation, "_identify", slowly)
    monkeypatch.setattr(curation, "telling", partial(telling, every_seconds=0.02))

    curate(make_spec(world), tokenizer, world / "out", lambda *call: calls.append(call))

    told = [(done, total) for step, done, total in calls if step == "identify"]
    assert told[0] == (0, 100)
    assert any(0 < done < 100 for done, _ in told)


def test_inputs_follow_the_data_and_not_their_directory(world, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_world(elsewhere)

    inputs = curation_inputs(make_spec(world))

    assert inputs == curation_inputs(make_spec(elsewhere))
    write_rows(elsewhere / "chat.jsonl", general_rows(1))
    assert inputs != curation_inputs(make_spec(elsewhere))


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_memory_limit_spills_and_changes_no_byte(world, tokenizer, monkeypatch):
    noise = np.random.default_rng(0).bytes(6_000_000).hex()
    unfit = [{"prompt": "", "response": noise[n * 200 : (n + 1) * 200]} for n in range(60_000)]
    write_rows(world / "general.jsonl", [*unfit, *general_rows(100), *general_rows(20)])
    spilled = []
    monkeypatch.setattr(
        curation, "read_source", _watched(curation.read_source, world / "small", spilled)
    )

    for name, max_memory_gb in (("large", None), ("small", 0.08)):
        limits = {"max_tokens": 400, "max_memory_gb": max_memory_gb}
        curate(make_spec(world, curation=limits), tokenizer, world / name)

    assert _files(world / "small") == _files(world / "large")
    assert sum(spilled) > 0


def _watched(read_source, out, spilled):
    """Notes the bytes that the data engine has written aside after each source."""

    def watched(*arguments):
        layout = read_source(*arguments)
        spilled.extend(path.stat().st_size for path in out.glob(".duckdb-*/duckdb_temp*"))
        return layout

    return watched


def test_a_memory_limit_too_low_for_any_work_is_an_error_with_the_mend(world, tokenizer):
    spec = make_spec(world, curation={"max_memory_gb": 0.001})

    with pytest.raises(MemoryLimitError, match=r"`curation\.max_memory_gb` 0\.001.*Raise it"):
        curate(spec, tokenizer, world / "out")


def test_the_memory_limit_is_no_part_of_identity(tiny_world, tmp_path):
    fields = tiny_fields(tiny_world)
    stages = [
        curate_stage(
            ExperimentSpec.model_validate(fields | {"curation": fields["curation"] | limit}),
            tmp_path,
        )
        for limit in ({}, {"max_memory_gb": 1.0}, {"max_tokens": 63})
    ]

    assert [stage.reused for stage in stages] == [False, True, False]
