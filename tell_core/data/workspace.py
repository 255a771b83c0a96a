"""The tables in which curation works: one in-memory DuckDB that spills to disk when it must."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy.typing as npt
import pyarrow as pa

from tell_core.errors import InputError


class MemoryLimitError(InputError):
    """The data engine was given too little memory."""


# The bar is never drawn, but without it the engine would not count how far a statement is.
_COUNT_PROGRESS = "set enable_progress_bar_print = false; set enable_progress_bar = true"
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
def open_workspace(
    directory: Path, max_memory_gb: float | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Tables `sources`, `raw`, `examples` and `rejects`, all empty; gone when the block ends.

    Args:
        directory: Existing directory under which to spill.
        max_memory_gb: Memory of the data engine in gigabytes, tables included; None: 80 % of the
            machine's. Rows of 1 kB need about 0.4 of it, longer ones more, whatever their number.

    Raises:
        MemoryLimitError: A single operation does not fit into that memory.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix=".duckdb-") as spill:
        config: dict[str, Any] = {"temp_directory": spill}
        if max_memory_gb is not None:
            config["memory_limit"] = f"{max_memory_gb * 1000:.0f}MB"
        connection = duckdb.connect(config=config)
        try:
            connection.execute(_COUNT_PROGRESS)
            connection.execute(_TABLES)
            yield connection
        except duckdb.OutOfMemoryException as error:
            reason = str(error).partition("\n")[0]
            raise MemoryLimitError(
                f"curation needs more memory than `curation.max_memory_gb` {max_memory_gb}, even"
                f" with what can be spilled on disk: {reason}. Raise it; the result is the same."
            ) from error
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
    """As `stream_batches`, for numbers and booleans: each batch as one array per column."""
    reader = connection.cursor().sql(query).to_arrow_reader(batch_rows)
    for batch in reader:
        if batch.num_rows:
            yield {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}


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
