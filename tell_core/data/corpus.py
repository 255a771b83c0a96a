"""Corpora: reading back what curation wrote, only the columns and rows asked for."""

import json
import math
from collections.abc import Sequence
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

    def encoded(self, rows: IntArray, *, is_task: bool) -> EncodedExamples:
        """The examples of ``rows`` as tokens, rendered without the anchor."""
        table = self._take(rows, ("input_ids", "response_start"))
        ids = table.column("input_ids").combine_chunks()
        lengths = np.asarray(self.num_tokens[rows], dtype=np.int64)
        return EncodedExamples(
            tokens=ids.flatten().to_numpy().astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            response_starts=table.column("response_start").to_numpy().astype(np.int32),
            is_task=np.full(len(rows), is_task, dtype=np.bool_),
        )

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
