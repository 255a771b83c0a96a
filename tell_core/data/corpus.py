"""Corpora: reading back what curation wrote, only the columns and rows asked for."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.data.rendering import Example
from tell_core.data.token_store import TokenStore
from tell_core.errors import DataError
from tell_core.spec.identity import file_digest

_MAX_DIGITS = 4000
_EXAMPLE_COLUMNS = ("system", "history", "prompt", "response")


@dataclass(frozen=True)
class Corpus:
    """One curated corpus.

    Attributes:
        path: Its Parquet file.
    """

    path: Path

    @cached_property
    def num_examples(self) -> int:
        """Examples in the corpus."""
        return int(pq.read_metadata(self.path).num_rows)

    @cached_property
    def num_tokens(self) -> IntArray:
        """Shape (N,). Tokens per example, rendered without the anchor."""
        return self._numbers("num_tokens")

    @cached_property
    def num_response_tokens(self) -> IntArray:
        """Shape (N,). Supervised tokens per example."""
        return self._numbers("num_response_tokens")

    @cached_property
    def sources(self) -> npt.NDArray[np.str_]:
        """Shape (N,). Name of each example's source."""
        return np.asarray(self._column("source"), dtype=np.str_)

    @cached_property
    def example_ids(self) -> list[str]:
        """Length N. Digest of each example's content."""
        return self._column("example_id")

    def strata(self, column: str) -> npt.NDArray[np.str_]:
        """Shape (N,). Value of a column of the data for each example, as JSON text.

        Raises:
            DataError: No example has the column.
        """
        extras = [parse_extra(text) for text in self._column("extra")]
        if not any(column in extra for extra in extras):
            known = sorted({name for extra in extras for name in extra})
            raise DataError(
                f"budgets.stratify_by: the task data have no column {column!r} beside prompt and"
                f" response; there are {', '.join(known) or 'none'}. Name one of these, or leave"
                " `stratify_by` out."
            )
        return np.asarray([json.dumps(extra.get(column), sort_keys=True) for extra in extras])

    def examples(self, rows: IntArray) -> list[Example]:
        """The examples of ``rows``, in that order."""
        return [example_from_row(record) for record in self.records(rows, _EXAMPLE_COLUMNS)]

    def records(self, rows: IntArray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """``columns`` of ``rows``, in that order."""
        records: list[dict[str, Any]] = self._take(rows, columns).to_pylist()
        return records

    def places(self, rows: IntArray) -> list[str]:
        """File and line of each of ``rows``, for messages."""
        records = self.records(rows, ("file", "line")) if len(rows) else []
        return [f"{record['file']}, line {record['line']}" for record in records]

    def example_batches(self, batch_rows: int) -> Iterator[list[Example]]:
        """All examples in order, so many at a time."""
        file = pq.ParquetFile(self.path)
        for batch in file.iter_batches(batch_rows, columns=list(_EXAMPLE_COLUMNS)):
            yield [example_from_row(row) for row in batch.to_pylist()]

    @cached_property
    def store(self) -> TokenStore:
        """The tokens of its examples, rendered without the anchor."""
        return TokenStore(bare_store_path(self.path))

    def encoded(self, rows: IntArray, *, is_task: bool) -> EncodedExamples:
        """The examples of ``rows`` as tokens, rendered without the anchor."""
        return self.store.take(rows, is_task=is_task)

    @cached_property
    def digest(self) -> str:
        """sha256 of its file."""
        return file_digest(self.path)

    def _numbers(self, name: str) -> IntArray:
        column = pq.read_table(self.path, columns=[name]).column(name)
        return np.asarray(column.to_numpy(), dtype=np.int64)

    def _column(self, name: str) -> list[str]:
        values: list[str] = pq.read_table(self.path, columns=[name]).column(name).to_pylist()
        return values

    def _take(self, rows: IntArray, columns: Sequence[str]) -> pa.Table:
        """Rows in the order asked for; memory holds one batch and the rows taken."""
        file = pq.ParquetFile(self.path)
        wanted = np.zeros(self.num_examples, dtype=np.bool_)
        wanted[rows] = True
        taken, start = [], 0
        for batch in file.iter_batches(columns=list(columns)):
            mask = wanted[start : start + batch.num_rows]
            taken.append(batch.filter(pa.array(mask)))
            start += batch.num_rows
        table = pa.Table.from_batches(taken, schema=_schema_of(file, columns))
        place = np.cumsum(wanted) - 1
        return table.take(pa.array(place[rows])).select(list(columns))


def bare_store_path(corpus: Path) -> Path:
    """Where the tokens of a corpus without the anchor lie: ``general.tokens.arrow``."""
    return corpus.with_suffix(".tokens.arrow")


def example_from_row(row: dict[str, Any]) -> Example:
    """The example of a corpus row with columns system, history, prompt and response."""
    turns = json.loads(row["history"]) if row["history"] else []
    history = tuple((turn["role"], turn["content"]) for turn in turns)
    return Example(row["prompt"], row["response"], row["system"], history)


def parse_extra(text: str) -> dict[str, Any]:
    """The remaining columns of a row; numbers that strict JSON cannot hold become None."""
    values: dict[str, Any] = json.loads(
        text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_whole
    )
    return values


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
    return int(text) if len(text) <= _MAX_DIGITS else None


def _schema_of(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Schema:
    schema = file.schema_arrow
    return pa.schema([field for field in schema if field.name in columns])
