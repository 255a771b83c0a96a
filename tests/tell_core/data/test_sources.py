import pytest

from tell_core.data.sources import resolve_source, source_identity
from tell_core.errors import DataError
from tell_core.spec.model import SourceSpec


def _resolve(path, **fields):
    return resolve_source(SourceSpec(path=str(path), **fields), "general", "general[0]")


def test_directory_means_its_data_files_in_sorted_order(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl.gz", "a.csv", "labels.json", "notes.txt", "more/c.parquet"):
        (tmp_path / name).touch()

    files = _resolve(tmp_path).files

    names = [file.relative_to(tmp_path).as_posix() for file in files]
    assert names == ["a.csv", "b.jsonl.gz", "more/c.parquet"]


def test_glob_means_the_files_it_matches(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        (tmp_path / name).touch()

    assert [file.name for file in _resolve(tmp_path / "a*.jsonl").files] == ["a1.jsonl", "a2.jsonl"]


def test_missing_file_says_what_was_tried(tmp_path):
    with pytest.raises(DataError, match=r"general\[0\].*no file, no directory.*hub dataset id"):
        _resolve(tmp_path / "none.jsonl")


def test_unknown_type_is_an_error(tmp_path):
    (tmp_path / "a.xlsx").touch()

    with pytest.raises(DataError, match=r"a\.xlsx is of no known type.*JSONL"):
        _resolve(tmp_path / "a.xlsx")


def test_directory_without_data_is_an_error_that_says_what_of_json(tmp_path):
    (tmp_path / "alpaca.json").write_text("[]")

    with pytest.raises(DataError, match=r"holds no \.jsonl, .*\.json file in a directory"):
        _resolve(tmp_path)


def test_owner_and_name_without_a_local_file_is_a_hub_dataset():
    source = _resolve("some-owner/some-name", revision="abc", split="validation")

    assert source.is_hub
    assert source_identity(source)["hub"] == {
        "id": "some-owner/some-name",
        "subset": None,
        "revision": "abc",
        "split": "validation",
    }


def test_identity_follows_content_and_not_directory(tmp_path):
    for name in ("x", "y", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("{}" if name != "z" else "[]")

    x, y, z = (source_identity(_resolve(tmp_path / name / "a.jsonl")) for name in "xyz")

    assert x == y != z
