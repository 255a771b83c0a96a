"""Records: the rows of files as JSON text with their exact line, bad ones marked, none lost.

Lines are split here and not by the data engine, whose own reader reports wrong line numbers for
bad rows and turns them into rows of nulls.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from tell_core.data.sources import ResolvedSource
from tell_core.errors import DataError

RECORD_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("record", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_ROWS_PER_BATCH = 8192
_MAX_FIELD_CHARACTERS = 1 << 30
_SURELY_SHALLOW = 500


class Record(NamedTuple):
    """One row of a file.

    Attributes:
        line: Line on which it begins, from 1; in a JSON array, the number of the element.
        record: The row as JSON text, or the raw text of a row that is none.
        reason: Why the row cannot be read, or None.
        detail: What exactly is wrong, or None.
    """

    line: int
    record: str
    reason: str | None = None
    detail: str | None = None


def json_records(path: Path) -> Iterator[Record]:
    """Rows of a JSONL file, or the elements of a ``.json`` file that holds one array.

    A byte order mark and blank lines are skipped; blank lines are no rows but count as lines.

    Raises:
        DataError: The file cannot be read to its end, or its array is not valid JSON.
    """
    with open_binary(path) as stream:
        if ".json" in path.suffixes and _begins_with_bracket(stream):
            yield from _array_records(path, stream)
            return
        for line, raw in enumerate(stream, start=1):
            content = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if content.strip():
                yield _decoded(line, content.rstrip(b"\r\n"))


def csv_records(path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header, as JSON objects of text.

    Raises:
        DataError: The file cannot be read to its end, or its header names a column twice.
    """
    with open_binary(path) as stream, _large_fields():
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = _csv_header(path, reader)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(line, "", "bad_csv", f"{error}; is a quote left open on this line?")
                continue
            if fields:
                yield _csv_record(line, header, fields)


def record_batches(records: Iterable[Record]) -> Iterator[pa.Table]:
    """Records in tables of `RECORD_SCHEMA`, a few thousand rows each."""
    rows = iter(records)
    while batch := list(islice(rows, _ROWS_PER_BATCH)):
        columns = [pa.array(column, pa.string()) for column in list(zip(*batch, strict=True))[1:]]
        lines = pa.array([record.line for record in batch], pa.int64())
        yield pa.Table.from_arrays([lines, *columns], schema=RECORD_SCHEMA)


def hub_batches(source: ResolvedSource) -> Iterator[pa.Table]:
    """Rows of a hub dataset as Arrow tables. Remote code is never run.

    Raises:
        DataError: The dataset cannot be loaded; the message says what was tried.
    """
    from datasets import load_dataset  # costs seconds, and only hub sources need it

    spec = source.spec
    try:
        dataset = load_dataset(
            spec.path, spec.subset, split=spec.split, revision=spec.revision, streaming=False
        )
    except Exception as error:  # the library raises errors of many kinds, all mean the same here
        raise DataError(
            f"{source.key}: no file, directory or glob matches {spec.path!r} (looked in"
            f" {Path.cwd()}), and as a hub dataset (subset {spec.subset}, split {spec.split!r},"
            f" revision {spec.revision}) it could not be loaded: {type(error).__name__}: {error}."
            " Correct the path, or check the id, the split and the network."
        ) from error
    yield from dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH)


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed according to its name.

    Raises:
        DataError: Opening it or reading it to its end failed.
    """
    with explain_unreadable(path), pa.input_stream(str(path), compression="detect") as stream:
        yield cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


@contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """Turn an input error into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error}. Is the file complete, and of the type its name says?"
        ) from error


def _begins_with_bracket(stream: BinaryIO) -> bool:
    peek = cast(io.BufferedReader, stream).peek(64)
    return peek.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _array_records(path: Path, stream: BinaryIO) -> Iterator[Record]:
    try:
        elements = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} begins as a JSON array but is not valid JSON: {error}. Mend it, or write one"
            " JSON object per line (JSONL)."
        ) from error
    for number, element in enumerate(elements, start=1):
        yield Record(number, json.dumps(element))


def _decoded(line: int, content: bytes) -> Record:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start + 1} of the line is not UTF-8"
        return Record(line, content.decode("utf-8", "replace"), "bad_utf8", detail)
    if text.count("[") + text.count("{") > _SURELY_SHALLOW and _is_too_deep(text):
        return Record(line, text, "bad_json", "lists or objects are nested too deeply")
    return Record(line, text)


def _is_too_deep(text: str) -> bool:
    """Whether Python cannot parse what the data engine, which knows no limit, would accept."""
    try:
        json.loads(text)
    except RecursionError:
        return True
    except ValueError:
        return False
    return False


def _csv_header(path: Path, reader: Any) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{path}: the header on line 1 is not valid CSV: {error}.") from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the header names {', '.join(map(repr, twice))} more than once; give every"
            " column a name of its own."
        )
    return header


def _csv_record(line: int, header: list[str], fields: list[str]) -> Record:
    record = json.dumps(dict(zip(header, fields, strict=False)), ensure_ascii=False)
    if not _is_text(record):
        readable = record.encode("utf-8", "replace").decode()
        return Record(line, readable, "bad_utf8", "the row holds bytes that are not UTF-8")
    if len(fields) != len(header):
        detail = f"{len(fields)} fields, but the header has {len(header)}"
        return Record(line, record, "wrong_width", detail)
    return Record(line, record)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _large_fields() -> Iterator[None]:
    """Lift the limit on the length of a CSV field, which belongs to the whole interpreter."""
    before = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)
