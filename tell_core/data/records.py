"""Records: the rows of files as JSON text with their exact line, bad ones marked, none lost.

Lines are split here and not by the data engine, whose own reader reports wrong line numbers for
bad rows and turns them into rows of nulls.
"""

import codecs
import csv
import io
import json
import logging
import re
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
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOG = logging.getLogger(__name__)
_INK = re.compile(r"[^ \t\r\n]")


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
        taken: list[str] = []
        reader = csv.reader(_noted(text, taken), strict=True)
        header = _csv_header(path, reader)
        while True:
            line = reader.line_num + 1
            taken.clear()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                detail = f"{error}; is a quote left open on this line?"
                yield Record(line, _readable("".join(taken)), "bad_csv", detail)
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


def hub_batches(source: ResolvedSource, revision: str | None) -> Iterator[pa.Table]:
    """Rows of a hub dataset as Arrow tables, streamed when asked. Remote code is never run.

    Args:
        source: A source for which `is_hub` holds.
        revision: Which of its states is read, see `hub_commit`.

    Raises:
        DataError: The dataset cannot be loaded or read; the message says what was tried.
    """
    from datasets import load_dataset  # costs seconds, and only hub sources need it

    spec = source.spec
    try:
        dataset = load_dataset(
            spec.path, spec.subset, split=spec.split, revision=revision, streaming=spec.streaming
        )
        yield from dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH)
    except Exception as error:  # the library raises errors of many kinds, all mean the same here
        raise DataError(
            f"{source.key}: no file, directory or glob matches {spec.path!r} (looked in"
            f" {Path.cwd()}), and as a hub dataset (subset {spec.subset}, split {spec.split!r},"
            f" revision {revision}) it could not be loaded: {type(error).__name__}: {error}."
            " Correct the path, or check the id, the split and the network."
        ) from error


def hub_commit(source: ResolvedSource) -> str | None:
    """The commit that a hub dataset's revision stands for now, so that a record can name it.

    Returns:
        The 40 digits of the commit; the revision as given where the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    spec = source.spec
    if spec.revision and _COMMIT.fullmatch(spec.revision):
        return spec.revision
    try:
        return str(HfApi().dataset_info(spec.path, revision=spec.revision).sha)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        _LOG.warning(
            "%s: which commit revision %s of %s stands for could not be found out (%s); give a"
            " commit under `revision` to be sure of equal data",
            source.key, spec.revision, spec.path, error,
        )  # fmt: skip
        return spec.revision


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
    """Elements as they stand in the file, so that what is odd in one is seen like in a line."""
    text = stream.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    try:
        for number, (start, end) in enumerate(_element_places(text), start=1):
            yield _decoded(number, text[start:end].encode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} begins as a JSON array but is not valid JSON: {error}. Mend it, or write one"
            " JSON object per line (JSONL)."
        ) from error


def _element_places(text: str) -> Iterator[tuple[int, int]]:
    """Where each element of a JSON array begins and ends.

    Raises:
        ValueError: ``text`` is no JSON array.
    """
    decode = json.JSONDecoder().raw_decode
    place = _skip_blanks(text, text.index("[") + 1)
    sign = ","
    if text[place : place + 1] == "]":
        sign, place = "]", _skip_blanks(text, place + 1)
    while sign == ",":
        _, end = decode(text, place)
        yield place, end
        place = _skip_blanks(text, end)
        sign = text[place : place + 1]
        place = _skip_blanks(text, place + 1)
    if sign != "]" or place < len(text):
        raise json.JSONDecodeError("expecting ',' or the end of the array", text, place)


def _skip_blanks(text: str, place: int) -> int:
    """First place from ``place`` on that is not white space."""
    found = _INK.search(text, place)
    return found.start() if found else len(text)


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


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The same lines, each noted when it is taken."""
    for line in lines:
        taken.append(line)
        yield line


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
        detail = "the row holds bytes that are not UTF-8"
        return Record(line, _readable(record), "bad_utf8", detail)
    if len(fields) != len(header):
        detail = f"{len(fields)} fields, but the header has {len(header)}"
        return Record(line, record, "wrong_width", detail)
    return Record(line, record)


def _readable(value: str) -> str:
    """``value`` with a question mark for each byte that is not UTF-8."""
    return value.encode("utf-8", "replace").decode()


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
