"""Tables of prompts to be answered: read from JSONL, CSV or Parquet, written back with answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tell_core.data.records import Record, csv_records, json_records
from tell_core.data.sources import kind_of, resolve_source
from tell_core.errors import DataError, InputError
from tell_core.spec.model import SourceSpec
from tell_core.store import explain_disk_errors, write_text

PREDICTION = "prediction"
_OUTPUTS = (".jsonl", ".csv", ".parquet")
_MAX_LISTED = 5

Row = dict[str, Any]


def read_prompts(path: Path, column: str = "prompt") -> list[Row]:
    """Rows of a file (or of all files of a directory or glob), each with text in ``column``.

    Nothing is left out silently: an answer for every row, or none at all.

    Raises:
        DataError: A file cannot be read, or a row holds no prompt; the first ones are listed.
    """
    source = resolve_source(SourceSpec(path=str(path)), "task_test", "--input")
    if source.is_hub:
        raise DataError(f"--input: there is no file {path}; give JSONL, CSV or Parquet")
    rows: list[Row] = []
    unfit: list[str] = []
    for file in source.files:
        for record in _records(file):
            row = _row(record)
            if row is None or not isinstance(row.get(column), str) or not row[column].strip():
                unfit.append(f"{file}, line {record.line}")
            else:
                rows.append(row)
    if unfit or not rows:
        more = f" and {len(unfit) - _MAX_LISTED} more" if len(unfit) > _MAX_LISTED else ""
        where = "; ".join(unfit[:_MAX_LISTED]) or f"{path} is empty"
        raise DataError(
            f"needed is text in column {column!r} of every row; it is missing here: {where}{more}."
            " Mend or remove those rows, or name another column with --column."
        )
    return rows


def check_output(path: Path) -> None:
    """Know before anything is computed that the answers can be written.

    Raises:
        InputError: The name has no known ending, or its directory does not exist.
    """
    if path.suffix not in _OUTPUTS:
        raise InputError(f"--output {path}: the name must end in one of {', '.join(_OUTPUTS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {path.absolute().parent}")


def write_predictions(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], out: Path) -> None:
    """Write the rows with their answers in column ``prediction``, in one step.

    Args:
        rows: As read.
        answers: One per row.
        out: File to write; its ending decides about the format.

    Raises:
        StoreError: It cannot be written.
    """
    found = [dict(row) | {PREDICTION: answer} for row, answer in zip(rows, answers, strict=True)]
    if out.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        write_text(out, "".join(lines))
        return
    with explain_disk_errors(out):
        aside = out.with_name(f".{out.name}.partial")
        table = pd.DataFrame([{name: _flat(value) for name, value in r.items()} for r in found])
        if out.suffix == ".csv":
            table.to_csv(aside, index=False)
        else:
            pq.write_table(pa.Table.from_pandas(table, preserve_index=False), aside)
        aside.replace(out)


def _records(path: Path) -> Iterator[Record]:
    kind = kind_of(path)
    if kind != "parquet":
        yield from json_records(path) if kind == "json" else csv_records(path)
        return
    line = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield Record(line, json.dumps(row, ensure_ascii=False, default=str))
    except pa.ArrowException as error:
        raise DataError(f"cannot read {path} as Parquet: {error}. Is the file complete?") from error


def _row(record: Record) -> Row | None:
    """The row of a record, or None where it is no JSON object."""
    if record.reason is not None:
        return None
    try:
        value = json.loads(record.record)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _flat(value: Any) -> Any:
    """Nested values become JSON text, which a cell of a table can hold."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
