import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.records import csv_records, json_records
from tell_core.errors import DataError


def _rows(path, content, read=json_records):
    path.write_bytes(content)
    return list(read(path))


def test_byte_order_mark_crlf_and_blank_lines_keep_exact_line_numbers(tmp_path):
    rows = _rows(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a":1}\r\n\r\n  \n{"b":2}')

    assert [(row.line, row.record, row.reason) for row in rows] == [
        (1, '{"a":1}', None),
        (4, '{"b":2}', None),
    ]


def test_line_separators_inside_text_do_not_end_a_line(tmp_path):
    rows = _rows(tmp_path / "a.jsonl", '{"a":"x\u2028y\x85z"}\n{}'.encode())

    assert [row.line for row in rows] == [1, 2]


def test_bytes_that_are_not_utf8_are_marked_with_their_place(tmp_path):
    rows = _rows(tmp_path / "a.jsonl", b'{}\n{"a":"\xff"}\n{}')

    assert [(row.line, row.reason) for row in rows] == [(1, None), (2, "bad_utf8"), (3, None)]
    assert rows[1].detail == "byte 7 of the line is not UTF-8"


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_compressed_lines_are_read(tmp_path, suffix, compress):
    rows = _rows(tmp_path / f"a.jsonl{suffix}", compress(b'{"a":1}\n{"b":2}\n'))

    assert [row.record for row in rows] == ['{"a":1}', '{"b":2}']


def test_truncated_compressed_file_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz.*complete"):
        _rows(tmp_path / "a.jsonl.gz", gzip.compress(b"{}\n" * 1000)[:-12])


def test_json_array_is_read_element_by_element(tmp_path):
    rows = _rows(tmp_path / "a.json", b' [\n{"a":1},\n{"b":"\xc3\xa9"}]')

    assert [(row.line, json.loads(row.record)) for row in rows] == [(1, {"a": 1}), (2, {"b": "é"})]


@pytest.mark.parametrize(
    "content", [b'[{"a":1},', b"[1 2]", b"[1", b"[1,]", b"[1] 2", b"[", b"[] []"]
)
def test_broken_json_array_is_a_clear_error(tmp_path, content):
    with pytest.raises(DataError, match=r"a\.json begins as a JSON array"):
        _rows(tmp_path / "a.json", content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(values, max_size=5), st.sampled_from([None, 1, "\t"]))
def test_array_gives_its_elements_however_it_is_written(tmp_path_factory, elements, indent):
    path = tmp_path_factory.mktemp("array") / "a.json"
    content = json.dumps(elements, indent=indent).encode()

    assert [json.loads(row.record) for row in _rows(path, content)] == elements


def test_element_of_an_array_is_left_as_it_stands(tmp_path):
    content = b'[{"a":1,"a":2}, {"b": 1e400}, {"c":"\xff"}]'
    rows = _rows(tmp_path / "a.json", content)

    assert [row.record for row in rows[:2]] == ['{"a":1,"a":2}', '{"b": 1e400}']
    assert (rows[2].line, rows[2].reason) == (3, "bad_utf8")


def test_json_file_of_lines_is_read_by_line(tmp_path):
    assert len(_rows(tmp_path / "a.json", b'{"a":1}\n{"a":2}\n')) == 2


def test_csv_rows_have_the_line_on_which_they_begin(tmp_path):
    content = b'\xef\xbb\xbfprompt,response\r\n"two\r\nlines",a\r\n\r\nq,"say ""hi"""\r\n'
    rows = _rows(tmp_path / "a.csv", content, csv_records)

    assert [(row.line, json.loads(row.record)) for row in rows] == [
        (2, {"prompt": "two\r\nlines", "response": "a"}),
        (5, {"prompt": "q", "response": 'say "hi"'}),
    ]


def test_unfit_csv_rows_are_marked(tmp_path):
    content = b'prompt,response\na\nb,c,d\n\xff,x\nq,r\n"a"b,c\n"open,\n'
    rows = _rows(tmp_path / "a.csv", content, csv_records)

    assert [(row.line, row.reason) for row in rows] == [
        (2, "wrong_width"),
        (3, "wrong_width"),
        (4, "bad_utf8"),
        (5, None),
        (6, "bad_csv"),
        (7, "bad_csv"),
    ]


def test_unreadable_csv_row_keeps_its_text(tmp_path):
    rows = _rows(tmp_path / "a.csv", b'prompt,response\nb,c\n"a"x,\xff\n', csv_records)

    assert (rows[1].reason, rows[1].record) == ("bad_csv", '"a"x,?\n')


def test_csv_field_of_any_length_is_read(tmp_path):
    rows = _rows(tmp_path / "a.csv", b"prompt,response\n" + b"x" * 300_000 + b",y\n", csv_records)

    assert len(json.loads(rows[0].record)["prompt"]) == 300_000


def test_csv_column_named_twice_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="'a' more than once"):
        _rows(tmp_path / "a.csv", b"a,b,a\n", csv_records)


def test_rows_nested_too_deeply_are_marked(tmp_path):
    deep = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"
    wide = b'{"a":[' + b",".join([b"[]"] * 5000) + b"]}"
    rows = _rows(tmp_path / "a.jsonl", deep + b"\n" + wide)

    assert [row.reason for row in rows] == ["bad_json", None]
