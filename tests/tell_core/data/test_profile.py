import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tell_core.data.curation import curate
from tell_core.data.profile import _histogram, profile_source
from tell_core.data.reading import read_source
from tell_core.data.sources import resolve_source
from tell_core.data.workspace import insert_table, open_workspace
from tell_core.spec.model import SourceSpec

from .worlds import general_rows, make_spec, write_rows, write_world


@given(arrays(np.int64, st.integers(0, 50), elements=st.integers(1, 5000)))
def test_histogram_counts_every_length_once(lengths):
    histogram = _histogram(lengths)

    assert sum(histogram["counts"]) == len(lengths)
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1


def _profile_of_three_rows(directory, statement=""):
    path = write_rows(directory / "a.jsonl", general_rows(3))
    source = resolve_source(SourceSpec(path=str(path)), "general", "general[0]")
    with open_workspace(directory) as connection:
        layout = read_source(connection, source, 0)
        connection.execute("alter table examples add column example_id varchar")
        connection.execute(
            "create table encoded (id bigint, num_tokens bigint, num_response_tokens bigint)"
        )
        lengths = {"id": [1, 2, 3], "num_tokens": [5, 6, 7], "num_response_tokens": [2, 2, 3]}
        insert_table(connection, "encoded", pa.table(lengths))
        if statement:
            connection.execute(statement)
        return profile_source(connection, source, 0, layout)


def test_profile_adds_up(tmp_path):
    profile = _profile_of_three_rows(tmp_path)

    assert (profile["num_read"], profile["num_kept"]) == (3, 3)
    assert (profile["num_tokens"], profile["num_response_tokens"]) == (18, 7)


def test_lost_row_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match=r"rows of general\[0\] were lost"):
        _profile_of_three_rows(tmp_path, "delete from examples where id = 2")


def test_row_counted_twice_is_noticed(tmp_path):
    twice = "insert into rejects by name select source_id, file, line, 'x' as reason from examples"

    with pytest.raises(AssertionError, match="were lost"):
        _profile_of_three_rows(tmp_path, twice)


def test_fingerprint_follows_content_and_not_directory(tmp_path):
    found = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        found.append(_profile_of_three_rows(tmp_path / name)["fingerprint"])

    assert found[0] == found[1]


ENGLISH = (
    "An expert at the department of disease prevention believes it is too early to declare"
    " another wave of the pandemic and three new infections were found yesterday, case"
)


def test_languages_are_counted_on_texts_that_are_long_enough(tmp_path, tokenizer):
    pytest.importorskip("py3langid")
    write_world(tmp_path)
    long = [{"prompt": f"{ENGLISH} {number}", "response": "r"} for number in range(60)]
    write_rows(tmp_path / "chat.jsonl", [*long, *general_rows(20)])
    curation = {"general_heldout_examples": 8, "near_duplicate_similarity": None}

    profile = curate(make_spec(tmp_path, curation=curation), tokenizer, tmp_path / "out")

    chat = next(source for source in profile["sources"] if source["name"] == "chat")
    assert chat["languages"] == {"en": 60}


def test_without_the_language_package_languages_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)

    assert _profile_of_three_rows(tmp_path)["languages"] is None
