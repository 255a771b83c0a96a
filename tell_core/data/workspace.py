"""The tables in which curation works: one in-memory DuckDB that spills to disk when it must."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy.typing as npt
import pyarrow as pa

_TABLES = """
create table sources (source_id integer, role varchar, name varchar, num_read bigint);
create table raw (file_index integer, line bigint, record varchar, reason varchar, detail varchar);
create table examples (
    id bigint, source_id integer, part varchar, file varchar, line bigint, system varchar,
    history varchar, prompt varchar, response varchar, extra varchar);
create table rejects (
    source_id integer, file varchar, line bigint, reason varchar, detail varchar, value double,
    text varchar);
"""
REJECT_TEXT_CHARACTERS = 500
EVIDENCE_CHARACTERS = 4000
"""Longest text kept of two examples that are to be compared by eye."""
HAS_INK = r"'[^\s\v\p{Z}]'"
"""SQL pattern of a text that is not all white space, Unicode's included."""


@contextmanager
def open_workspace(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Tables `sources`, `raw`, `examples` and `rejects`, all empty; gone when the block ends.

    Args:
        directory: Existing directory under which to spill.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix=".duckdb-") as spill:
        connection = duckdb.connect(config={"temp_directory": spill})
        try:
            connection.execute(_TABLES)
            yield connection
        finally:
            connection.close()


def spill_directory(connection: duckdb.DuckDBPyConnection) -> Path:
    """Where the workspace keeps what does not fit into memory; gone when it ends."""
    path = Path(fetch_one(connection, "select current_setting('temp_directory')"))
    path.mkdir(exist_ok=True)
    return path


def insert_table(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append an Arrow table whose columns are those of ``table``, by name."""
    connection.register("arriving", rows)
    connection.execute(f"insert into {table} by name select * from arriving")
    connection.unregister("arriving")


def stream_batches(
    connection: duckdb.DuckDBPyConnection, query: str, batch_rows: int
) -> Iterator[list[dict[str, Any]]]:
    """Rows of a query in batches, while ``connection`` itself goes on with other statements."""
    reader = connection.cursor().sql(query).to_arrow_reader(batch_rows)
    for batch in reader:
        if batch.num_rows:
            yield batch.to_pylist()


def stream_columns(
    connection: duckdb.DuckDBPyConnection, query: str, batch_rows: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """As `stream_batches`, for queries of numbers: each batch as one array per column."""
    reader = connection.cursor().sql(query).to_arrow_reader(batch_rows)
    for batch in reader:
        if batch.num_rows:
            yield {name: batch[name].to_numpy() for name in batch.schema.names}


def fetch_all(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any] = ()
) -> list[tuple[Any, ...]]:
    """All rows of a query."""
    rows: list[tuple[Any, ...]] = connection.execute(query, list(parameters)).fetchall()
    return rows


def fetch_one(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any] = ()
) -> Any:
    """The first value of the first row of a query."""
    return fetch_all(connection, query, parameters)[0][0]


def quoted(text: str) -> str:
    """``text`` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
