"""Token stores: the tokens of a corpus as one look shows it, rendered once and read by all cells.

A store is an uncompressed Arrow file of record batches. It is mapped into memory, so that processes
share its pages and read those of the examples they need. A mixture is an index over stores: rows,
order, and the digest of each store. pyarrow is imported where a store is opened: training reads
self-contained mixtures without it.

Shape letters: N examples, M positions of a whole training.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tell_core.data.encoding import (
    BoolArray,
    EncodedExamples,
    IntArray,
    Mixture,
    concatenate,
    from_lists,
)
from tell_core.errors import DataError, StoreError
from tell_core.spec.identity import file_digest

MIXTURE_FILE = "mixture.safetensors"
INDEX_FILE = "mixture_index.safetensors"
STORE_FILE = "tokens.arrow"
_RENDERER = b"renderer_digest"
_PARTS = "parts"
_AGAIN = "Run the same command again: what is missing or damaged is made anew."


class TokenWriter:
    """Writes a token store, batch by batch; comes from `open_writer`."""

    def __init__(self, sink: Any, renderer_digest: str):
        import pyarrow as pa

        self._schema = pa.schema(
            [("input_ids", pa.large_list(pa.int32())), ("response_start", pa.int32())],
            metadata={_RENDERER: renderer_digest.encode()},
        )
        self._file = pa.ipc.new_file(sink, self._schema)

    def append(self, examples: EncodedExamples) -> None:
        """Add examples as one record batch; it is what a reader holds in memory at least."""
        import pyarrow as pa

        ids = pa.LargeListArray.from_arrays(
            pa.array(examples.offsets, pa.int64()), pa.array(examples.tokens, pa.int32())
        )
        starts = pa.array(examples.response_starts, pa.int32())
        self._file.write_batch(pa.record_batch([ids, starts], schema=self._schema))

    def close(self) -> None:
        """Write the footer, without which the file cannot be read."""
        self._file.close()


@contextmanager
def open_writer(path: Path, renderer_digest: str) -> Iterator[TokenWriter]:
    """A writer of the store at ``path``, which is whole once the block has ended well.

    Args:
        path: File to write.
        renderer_digest: `ChatRenderer.digest` of what renders the examples.
    """
    with path.open("wb") as sink:
        writer = TokenWriter(sink, renderer_digest)
        yield writer
        writer.close()


class TokenStore:
    """The tokens of N examples on disk.

    Args:
        path: File written by `open_writer`.
        is_mapped: Map the file into memory; otherwise each batch is read when it is needed and let
            go at once, so that memory holds one of them.

    Raises:
        StoreError: The file is missing, unfinished or no token store.
    """

    def __init__(self, path: Path, *, is_mapped: bool = True):
        import pyarrow as pa

        self.path = path
        try:
            source = pa.memory_map(str(path)) if is_mapped else pa.OSFile(str(path))
            self._file = pa.ipc.open_file(source)
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(f"cannot read the token store {path}: {error}. {_AGAIN}") from error

    @property
    def renderer_digest(self) -> str:
        """Digest of tokenizer and template that rendered the examples."""
        return str(self._file.schema.metadata[_RENDERER].decode())

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return _content_digest(self.path)

    @cached_property
    def lengths(self) -> IntArray:
        """Shape (N,). Tokens per example."""
        return self._column(lambda batch: batch.lengths)

    @cached_property
    def supervised_counts(self) -> IntArray:
        """Shape (N,). Supervised tokens per example."""
        return self._column(lambda batch: batch.supervised_counts)

    def take(self, rows: IntArray, *, is_task: bool) -> EncodedExamples:
        """The examples of ``rows``, in that order."""
        places = np.argsort(rows, kind="stable")
        wanted = np.asarray(rows, dtype=np.int64)[places]
        edges = np.searchsorted(wanted, self._starts)
        taken = [
            self._batch(number).select(wanted[edges[number] : edges[number + 1]] - start)
            for number, start in enumerate(self._starts[:-1])
            if edges[number] < edges[number + 1]
        ]
        found = concatenate(taken) if taken else from_lists([], is_task)
        if (np.diff(places) < 0).any():
            found = found.select(np.argsort(places))
        return replace(found, is_task=np.full(len(found), is_task, dtype=np.bool_))

    @cached_property
    def _starts(self) -> IntArray:
        """First row of each batch, and the number of rows."""
        numbers = range(self._file.num_record_batches)
        sizes = [self._file.get_batch(number).num_rows for number in numbers]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _column(self, of: Callable[[EncodedExamples], IntArray]) -> IntArray:
        numbers = range(self._file.num_record_batches)
        parts = [np.empty(0, dtype=np.int64), *(of(self._batch(number)) for number in numbers)]
        return np.concatenate(parts).astype(np.int64)

    def _batch(self, number: int) -> EncodedExamples:
        """One record batch, its tokens where they lie."""
        ids, starts = self._file.get_batch(number).columns
        return EncodedExamples(
            tokens=ids.values.to_numpy(),
            offsets=ids.offsets.to_numpy(),
            response_starts=starts.to_numpy(),
            is_task=np.zeros(len(starts), dtype=np.bool_),
        )


@dataclass(frozen=True)
class IndexPart:
    """Examples of one store in a mixture.

    Attributes:
        store: The store.
        rows: Rows of the store, in order of choice.
        is_task: Whether they are task data.
    """

    store: TokenStore
    rows: IntArray
    is_task: bool


@dataclass(frozen=True)
class MixtureIndex:
    """A mixture as rows of token stores; `load` gives the mixture itself.

    Attributes:
        parts: Where its N examples lie, one part after another.
        order: Shape (M,), int32. As in `Mixture`.
    """

    parts: tuple[IndexPart, ...]
    order: IntArray

    @cached_property
    def lengths(self) -> IntArray:
        """Shape (N,). Tokens per example."""
        return self._of_examples([part.store.lengths[part.rows] for part in self.parts])

    @cached_property
    def supervised_counts(self) -> IntArray:
        """Shape (N,). Supervised tokens per example."""
        return self._of_examples([part.store.supervised_counts[part.rows] for part in self.parts])

    @cached_property
    def is_task(self) -> BoolArray:
        """Shape (N,). True for task data."""
        marks = [np.full(len(part.rows), part.is_task, dtype=np.bool_) for part in self.parts]
        return np.concatenate([np.empty(0, dtype=np.bool_), *marks])

    def load(self) -> Mixture:
        """The mixture with the tokens of all its examples in memory."""
        parts = [part.store.take(part.rows, is_task=part.is_task) for part in self.parts]
        return Mixture(concatenate(parts), self.order.astype(np.int32))

    def save(self, path: Path) -> None:
        """Write rows and order as safetensors, with place and sha256 of each store.

        A store is named by its directory and file: it must lie in a directory beside that of
        ``path``, so that a run directory can be moved.
        """
        records = [
            {
                "store": f"{part.store.path.parent.name}/{part.store.path.name}",
                "sha256": part.store.digest,
                "is_task": part.is_task,
            }
            for part in self.parts
        ]
        arrays = {f"rows_{at}": part.rows.astype(np.int64) for at, part in enumerate(self.parts)}
        arrays["order"] = self.order.astype(np.int32)
        save_file(arrays, path, metadata={_PARTS: json.dumps(records)})

    @classmethod
    def open(cls, path: Path) -> "MixtureIndex":
        """Read what `save` wrote.

        Raises:
            StoreError: A store is missing, or its content is not what it was.
        """
        with safe_open(path, framework="numpy") as file:
            records = json.loads(file.metadata()[_PARTS])
            rows = [file.get_tensor(f"rows_{at}") for at in range(len(records))]
            order = file.get_tensor("order")
        stores = [_known_store(path.parent.parent, record) for record in records]
        parts = [
            IndexPart(store, some, record["is_task"])
            for store, some, record in zip(stores, rows, records, strict=True)
        ]
        return cls(tuple(parts), order)

    @staticmethod
    def _of_examples(counts: list[IntArray]) -> IntArray:
        return np.concatenate([np.empty(0, dtype=np.int64), *counts])


def open_mixture(inputs: Path) -> Mixture:
    """The mixture of a cell, tokens in memory, from whichever form lies in ``inputs``.

    Args:
        inputs: A mix stage, which holds an index over token stores that lie beside it; or a
            directory with a self-contained ``mixture.safetensors``.

    Raises:
        DataError: There is no mixture.
        StoreError: A token store is missing, or its content is not what it was.
    """
    path = inputs / MIXTURE_FILE
    if path.is_file():
        return Mixture.load(path)
    if (inputs / INDEX_FILE).is_file():
        return MixtureIndex.open(inputs / INDEX_FILE).load()
    raise DataError(f"{path} is missing; needed: the mixture of this cell (`tell mix`)")


def has_stores(inputs: Path) -> bool:
    """Whether the token stores behind a mix stage are there and unchanged, if it needs any."""
    if not (inputs / INDEX_FILE).is_file():
        return True
    try:
        MixtureIndex.open(inputs / INDEX_FILE)
    except StoreError:
        return False
    return True


def _known_store(stages: Path, record: dict[str, Any]) -> TokenStore:
    """The store that an index names, if its content is still the same."""
    path = stages / record["store"]
    if not path.is_file() or _content_digest(path) != record["sha256"]:
        raise StoreError(
            f"the token store {path} is missing or not the one that this mixture was drawn from."
            f" {_AGAIN}"
        )
    return TokenStore(path)


def _content_digest(path: Path) -> str:
    """sha256 of a file, computed once per process as long as the file is not written to."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, written_at: int) -> str:
    del size, written_at  # only tell one content of the file from the next
    return file_digest(path)
