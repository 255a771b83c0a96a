import json
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.data.reading import read_source
from tell_core.data.sources import resolve_source
from tell_core.data.workspace import fetch_all, open_workspace
from tell_core.errors import DataError
from tell_core.spec.model import SourceSpec

from .worlds import write_rows


def _read(path, **fields):
    """Layout, kept examples as dicts and rejects as (line, reason)."""
    source = resolve_source(SourceSpec(path=str(path), **fields), "general", "general[0]")
    with open_workspace(path.parent) as connection:
        layout = read_source(connection, source, 0)
        columns = ("line", "system", "history", "prompt", "response", "extra")
        rows = fetch_all(connection, f"select {', '.join(columns)} from examples order by id")
        rejects = fetch_all(connection, "select line, reason from rejects order by line")
    return layout, [dict(zip(columns, row, strict=True)) for row in rows], rejects


def _read_rows(path, rows, **fields):
    return _read(write_rows(path, rows), **fields)


GOOD = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p", "respon', "bad_json"),
        (b'{"prompt": "p", "response": "\\ud800"}', "bad_json"),
        (b'["p", "r"]', "not_an_object"),
        (b'"p"', "not_an_object"),
        (b'{"prompt": "\xff", "response": "r"}', "bad_utf8"),
        (b'{"prompt": "p"}', "missing_column"),
        (b'{"prompt": "p", "response": null}', "missing_column"),
        (b'{"prompt": "p", "response": 5}', "not_text"),
        (b'{"prompt": ["p"], "response": "r"}', "not_text"),
        (b'{"prompt": "p", "response": "r", "system": 1}', "not_text"),
        (b'{"prompt": " \\u2003\\n", "response": "r"}', "empty_prompt"),
        (b'{"prompt": "p", "response": ""}', "empty_response"),
        (b'{"prompt": "p", "response": NaN}', "not_text"),
        (b'{"prompt": {"text": null}, "response": "r"}', "not_text"),
        (b'{"prompt": "p", "prompt": "q", "response": "r"}', "duplicate_key"),
        (b'{"prompt": "p", "response": "r", "n": 1, "n": 2}', "duplicate_key"),
        (b'{"prompt": "p\\u0000", "response": "r"}', "nul_character"),
        (b'{"prompt": "p", "response": "r", "system": "\\u0000"}', "nul_character"),
        (b'{"prompt": "p\x00", "response": "r"}', "bad_json"),
        (b'{"prompt": "p", "response": "r"}' + b"[" * 600, "bad_json"),
    ],
)
def test_unfit_line_is_set_aside_with_its_number_and_reason(tmp_path, line, reason):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b"", line, good]))

    _, kept, rejects = _read(path)

    assert rejects == [(3, reason)]
    assert [row["line"] for row in kept] == [1, 4]


lines = st.one_of(
    st.just(b'{"prompt": "p", "response": "r"}'),
    st.sampled_from([b"", b"  ", b"{", b"[]", b'{"prompt": 1, "response": "r"}', b"\xff\xfe"]),
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b" ")),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(lines, max_size=30))
def test_every_line_with_ink_is_kept_or_set_aside_once(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *content]))

    _, kept, rejects = _read(path)

    found = sorted([row["line"] for row in kept] + [line for line, _ in rejects])
    assert found == [1] + [at for at, line in enumerate(content, start=2) if line.strip()]


def test_extra_columns_travel_along(tmp_path):
    _, kept, _ = _read_rows(tmp_path / "a.jsonl", [GOOD | {"label": "yes", "n": [1, {"a": None}]}])

    assert json.loads(kept[0]["extra"]) == {"label": "yes", "n": [1, {"a": None}]}


def test_alpaca_joins_instruction_and_input(tmp_path):
    rows = [
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say no.", "output": "no"},
    ]

    layout, kept, _ = _read_rows(tmp_path / "a.jsonl", rows)

    assert layout.format == "alpaca"
    assert [row["prompt"] for row in kept] == ["Sort.\n\nb a", "Say hi.", "Say no."]


def _messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_messages_become_system_history_prompt_and_response(tmp_path):
    turns = [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2")]
    rows = [
        _messages(*turns, ("assistant", "a2")) | {"id": 7},
        _messages(("user", "u"), ("assistant", "a")),
    ]

    layout, kept, _ = _read_rows(tmp_path / "a.jsonl", rows)

    assert layout.format == "messages"
    first, second = kept
    assert (first["system"], first["prompt"], first["response"]) == ("s", "u2", "a2")
    assert (
        json.loads(first["history"]) == _messages(("user", "u1"), ("assistant", "a1"))["messages"]
    )
    assert json.loads(first["extra"]) == {"id": 7}
    assert (second["system"], second["history"], second["prompt"]) == (None, None, "u")


NAMELESS = _messages(("user", "u"), ("user", "v"), ("assistant", "a"))
del NAMELESS["messages"][1]["role"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (_messages(("user", "u")), "wrong_roles"),
        (_messages(("assistant", "a"), ("user", "u")), "wrong_roles"),
        (_messages(("user", "u"), ("user", "v"), ("assistant", "a")), "wrong_roles"),
        (_messages(("user", "u"), ("system", "s"), ("assistant", "a")), "wrong_roles"),
        (_messages(), "wrong_roles"),
        ({"messages": "hello"}, "wrong_roles"),
        ({"messages": [{"role": "user", "content": "u"}, {"content": "a"}]}, "wrong_roles"),
        ({"messages": [5, 6]}, "wrong_roles"),
        (NAMELESS, "wrong_roles"),
        (_messages(("user", 5), ("assistant", "a")), "not_text"),
        (_messages(("user", ["u"]), ("assistant", "a")), "not_text"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "not_text"),
        (_messages(("user", " "), ("assistant", "a")), "empty_prompt"),
        (_messages(("user", "u"), ("assistant", "")), "empty_response"),
        ({"messages": None}, "missing_column"),
        ({"messages": [None]}, "wrong_roles"),
        (_messages(("user", None), ("assistant", "a")), "not_text"),
        (_messages((None, "u"), ("assistant", "a")), "wrong_roles"),
        (_messages(("user", "u"), ("assistant", "a"), ("tool", "t")), "wrong_roles"),
        (_messages(("user", "u\0"), ("assistant", "a")), "nul_character"),
        (
            _messages(("user", "\0"), ("assistant", "a"), ("user", "u"), ("assistant", "a")),
            "nul_character",
        ),
    ],
)
def test_unfit_conversation_is_set_aside_with_its_reason(tmp_path, row, reason):
    good = _messages(("user", "u"), ("assistant", "a"))

    _, kept, rejects = _read_rows(tmp_path / "a.jsonl", [good, row])

    assert rejects == [(2, reason)]
    assert len(kept) == 1


def _conversation(*turns, **columns):
    return {"conversations": [{"from": role, "value": text} for role, text in turns]} | columns


def test_sharegpt_is_found_and_read_as_messages_are(tmp_path):
    turns = [("system", "s"), ("human", "u1"), ("gpt", "a1"), ("human", "u2"), ("gpt", "a2")]
    names = {"human": "user", "gpt": "assistant"}
    same = _messages(*((names.get(role, role), text) for role, text in turns)) | {"id": 7}

    layout, kept, _ = _read_rows(tmp_path / "a.jsonl", [_conversation(*turns, id=7)])
    _, expected, _ = _read_rows(tmp_path / "b.jsonl", [same])

    assert layout.format == "sharegpt"
    assert layout.columns == {"conversations": "conversations"}
    assert kept == expected


PAIR = (("human", "u"), ("gpt", "a"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (_conversation(("human", "u")), "wrong_roles"),
        (_conversation(("gpt", "a"), *PAIR), "wrong_roles"),
        (_conversation(*PAIR, ("human", "v")), "wrong_roles"),
        (_conversation(("human", "u"), ("human", "v"), ("gpt", "a")), "wrong_roles"),
        (_conversation(("human", "u"), ("bing", "a")), "wrong_roles"),
        (_conversation(*PAIR, ("observation", "o"), ("gpt", "a")), "wrong_roles"),
        (_conversation(("human", "u"), ("system", "s"), ("gpt", "a")), "wrong_roles"),
        (_conversation(), "wrong_roles"),
        ({"conversations": "hello"}, "wrong_roles"),
        (
            {"conversations": _messages(("user", "u"), ("assistant", "a"))["messages"]},
            "wrong_roles",
        ),
        (_conversation(("system", "s"), *PAIR, system="t"), "wrong_roles"),
        (_conversation(("human", 5), ("gpt", "a")), "not_text"),
        (_conversation(*PAIR, system=5), "not_text"),
        (_conversation(("human", " "), ("gpt", "a")), "empty_prompt"),
        (_conversation(("human", "u"), ("gpt", "")), "empty_response"),
        ({"conversations": None}, "missing_column"),
        (_conversation(("human", "u\0"), ("gpt", "a")), "nul_character"),
    ],
)
def test_unfit_sharegpt_row_is_set_aside_with_its_reason(tmp_path, row, reason):
    good = _conversation(*PAIR, system=None)

    _, kept, rejects = _read_rows(tmp_path / "a.jsonl", [good, row])

    assert rejects == [(2, reason)]
    assert len(kept) == 1


def test_system_column_of_sharegpt_stands_in_for_a_system_turn(tmp_path):
    rows = [_conversation(*PAIR, system="s"), _conversation(("system", "t"), *PAIR, system=None)]

    _, kept, rejects = _read_rows(tmp_path / "a.jsonl", rows)

    assert [(row["system"], row["prompt"]) for row in kept] == [("s", "u"), ("t", "u")]
    assert (rejects, {row["extra"] for row in kept}) == ([], {"{}"})


def test_mapped_column_of_turns_decides_about_the_format(tmp_path):
    turns = _messages(("user", "u"), ("assistant", "a"))["messages"]

    layout, kept, _ = _read_rows(
        tmp_path / "a.jsonl", [{"conversations": turns}], columns={"messages": "conversations"}
    )

    assert (layout.format, kept[0]["prompt"]) == ("messages", "u")


def test_message_with_a_key_twice_is_set_aside(tmp_path):
    good = json.dumps(_messages(("user", "u"), ("assistant", "a")))
    twice = good.replace('"content": "a"', '"content": "a", "content": "b"')
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n{twice}\n")

    _, kept, rejects = _read(path)

    assert (len(kept), rejects) == (1, [(2, "duplicate_key")])


def test_nulls_nested_in_other_columns_travel_along(tmp_path):
    extra = {"m": {"a": None, "b": [None, {"c": None}]}, "z": None}

    _, kept, rejects = _read_rows(tmp_path / "a.jsonl", [GOOD | extra])

    assert json.loads(kept[0]["extra"]) == extra
    assert not rejects


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_text_of_ten_megabytes_is_read_whole(tmp_path, name):
    rows = [GOOD, {"prompt": "x" * 10_000_000, "response": "r"}]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        path.write_text(
            "prompt,response\n" + "".join(f"{p},{r}\n" for p, r in map(dict.values, rows))
        )
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        write_rows(path, rows)

    _, kept, _ = _read(path)

    assert [len(row["prompt"]) for row in kept] == [1, 10_000_000]


def test_csv_with_bom_crlf_nul_and_bytes_of_another_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfprompt,response\r\np,r\r\na\x00b,r\r\ncaf\xe9,r\r\nq,s\r\n"
    )

    _, kept, rejects = _read(tmp_path / "a.csv")

    assert [row["prompt"] for row in kept] == ["p", "q"]
    assert rejects == [(3, "nul_character"), (4, "bad_utf8")]


BAD_LINES = (
    (b'{"prompt": "p", "respon', "bad_json"),
    (b"[1]", "not_an_object"),
    (b'{"prompt": 5, "response": "r"}', "not_text"),
    (b'{"prompt": "\xff", "response": "r"}', "bad_utf8"),
    (b'{"prompt": "", "response": "r"}', "empty_prompt"),
)


def test_ten_thousand_malformed_rows_are_all_set_aside_in_bounded_time(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [BAD_LINES[number % len(BAD_LINES)][0] for number in range(10_000)]
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *bad]))

    start = time.process_time()
    _, kept, rejects = _read(path)
    seconds = time.process_time() - start

    assert len(kept) == 1
    expected = [BAD_LINES[number % len(BAD_LINES)][1] for number in range(10_000)]
    assert rejects == list(enumerate(expected, start=2))
    assert seconds < 5  # measured: 0.1


def test_file_in_utf16_is_refused_by_its_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-16")

    with pytest.raises(DataError, match=r"none of the \d rows.*line 1: bad_utf8"):
        _read(path)


def test_file_of_malformed_rows_only_says_so_with_the_first(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([BAD_LINES[0][0]] * 10_000))

    with pytest.raises(DataError, match=r"none of the 10000 rows.*line 1: bad_json"):
        _read(path)


def test_any_columns_can_be_mapped(tmp_path):
    rows = [{"a/b~c": "p", "it's": "r", "rest": 1}]

    layout, kept, _ = _read_rows(
        tmp_path / "a.jsonl", rows, columns={"prompt": "a/b~c", "response": "it's"}
    )

    assert layout.format == "prompt_response"
    assert (kept[0]["prompt"], kept[0]["response"]) == ("p", "r")
    assert json.loads(kept[0]["extra"]) == {"rest": 1}


def test_mapped_columns_decide_between_formats(tmp_path):
    rows = [GOOD | {"question": "q", "answer": "a"}]

    layout, kept, _ = _read_rows(
        tmp_path / "a.jsonl", rows, columns={"instruction": "question", "output": "answer"}
    )

    assert (layout.format, kept[0]["prompt"]) == ("alpaca", "q")


def test_mapped_column_that_is_not_there_is_an_error_naming_those_that_are(tmp_path):
    with pytest.raises(DataError, match=r"no column 'question'.*prompt, response"):
        _read_rows(
            tmp_path / "a.jsonl", [GOOD], columns={"prompt": "question"}, format="prompt_response"
        )


def test_unknown_columns_are_an_error_with_the_mend(tmp_path):
    with pytest.raises(DataError, match=r"columns of .*a\.jsonl \(text\).*Map your columns"):
        _read_rows(tmp_path / "a.jsonl", [{"text": "x"}])


def test_misspelt_key_of_columns_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"general\[0\]\.columns: 'promt' is no column of ours"):
        _read_rows(tmp_path / "a.jsonl", [GOOD], columns={"promt": "prompt"})


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)

    with pytest.raises(DataError, match="there are no rows"):
        _read(path)


def test_file_of_unfit_rows_only_is_an_error_with_the_first(tmp_path):
    with pytest.raises(DataError, match=r"none of the 2 rows.*line 1: empty_prompt"):
        _read_rows(tmp_path / "a.jsonl", [GOOD | {"prompt": ""}] * 2)


def test_parquet_rows_are_checked_like_json(tmp_path):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    pq.write_table(pa.table({"messages": [messages, None, messages[:1]]}), tmp_path / "a.parquet")

    _, kept, rejects = _read(tmp_path / "a.parquet")

    assert [row["prompt"] for row in kept] == ["u"]
    assert rejects == [(2, "missing_column"), (3, "wrong_roles")]


def test_parquet_column_of_numbers_is_not_text(tmp_path):
    pq.write_table(pa.table({"prompt": ["p", "q"], "response": [1, 2]}), tmp_path / "a.parquet")

    with pytest.raises(DataError, match="not_text"):
        _read(tmp_path / "a.parquet")


def test_damaged_parquet_file_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")

    with pytest.raises(DataError, match=r"cannot read .*a\.parquet as Parquet"):
        _read(tmp_path / "a.parquet")


def test_csv_is_read_as_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\n1,02\n,x\n")

    _, kept, rejects = _read(tmp_path / "a.csv")

    assert [(row["prompt"], row["response"]) for row in kept] == [("1", "02")]
    assert rejects == [(3, "empty_prompt")]


def test_files_of_a_directory_are_read_in_order(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "b.jsonl", [GOOD | {"prompt": "second"}])
    write_rows(tmp_path / "data" / "a.jsonl", [GOOD | {"prompt": "first"}])

    _, kept, _ = _read(tmp_path / "data")

    assert [row["prompt"] for row in kept] == ["first", "second"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one dataset, read by the real library from a file; notes what it is asked."""
    from datasets import load_dataset

    path = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD | {"response": ""}])
    asked = []

    def load(*args, streaming, **kwargs):
        asked.append((args, kwargs))
        return load_dataset(
            "json", data_files=str(path), split="train", streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip

    def info(_hub, name, revision=None):
        return SimpleNamespace(sha={None: "0" * 40, "main": "1" * 40}[revision])

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    return asked


def _read_hub(directory, **fields):
    source = resolve_source(SourceSpec(path="owner/name", **fields), "general", "g")
    with open_workspace(directory) as connection:
        layout = read_source(connection, source, 0)
        return layout, fetch_all(connection, "select file, line, reason from rejects")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_is_read_through_its_library(tmp_path, hub, streaming):
    _, rejects = _read_hub(
        tmp_path, subset="en", split="test", revision="abc" + "0" * 37, streaming=streaming
    )

    [(args, kwargs)] = hub
    assert args == ("owner/name", "en")
    assert kwargs["split"] == "test" and kwargs["revision"] == "abc" + "0" * 37
    assert "trust_remote_code" not in kwargs
    assert rejects == [("owner/name@test", 2, "empty_response")]


@pytest.mark.parametrize(("given", "commit"), [(None, "0" * 40), ("main", "1" * 40)])
def test_hub_revision_is_settled_to_its_commit_before_reading(tmp_path, hub, given, commit):
    layout, _ = _read_hub(tmp_path, revision=given)

    [(_, kwargs)] = hub
    assert kwargs["revision"] == layout.revision == commit


def test_hub_that_cannot_be_asked_leaves_the_revision_as_given(tmp_path, hub, monkeypatch, caplog):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)

    layout, _ = _read_hub(tmp_path, revision="main")

    assert layout.revision == "main"
    assert "give a commit" in caplog.text


def test_unreachable_hub_dataset_says_what_was_tried(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    source = resolve_source(SourceSpec(path="owner/name"), "general", "general[0]")

    with (
        open_workspace(tmp_path) as connection,
        pytest.raises(DataError, match=r"general\[0\].*'owner/name'.*split 'train'.*no network"),
    ):
        read_source(connection, source, 0)
