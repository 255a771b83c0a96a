"""Loss traces: the loss of probe items and of their single tokens over the training of each cell.

Training measures them at logarithmically spaced steps and keeps them in its stage; here they are
read back, and written together as one Parquet file for questions in SQL.

Shape letters: N probe items, P probe steps, S traced tokens.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tell_core.analysis.cells import AnalysedCell, read_lines
from tell_core.analysis.emergence import emergence_of_cell
from tell_core.analysis.resampling import FloatArray
from tell_core.data.encoding import EncodedExamples
from tell_core.errors import AnalysisError
from tell_core.store import explain_disk_errors

IntArray = npt.NDArray[np.int64]

TRACES_FILE = "traces.parquet"
TRACES_SCHEMA = pa.schema(
    [
        ("cell", pa.dictionary(pa.int32(), pa.string())),
        ("arm", pa.dictionary(pa.int32(), pa.string())),
        ("task_budget_tokens", pa.int64()),
        ("general_budget_tokens", pa.int64()),
        ("seed", pa.int64()),
        ("step", pa.int64()),
        ("item_id", pa.dictionary(pa.int32(), pa.string())),
        ("role", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("loss", pa.float32()),
    ]
)


@dataclass(frozen=True)
class CellTrace:
    """The losses that one training left behind, in nats.

    Attributes:
        cell: The cell.
        steps: Shape (P,). Optimiser steps done at each probe, rising from 0.
        items: N names of the probe items.
        roles: N roles, "task", "general" or "retention".
        losses: Shape (P, N). Mean loss per supervised token of each item.
        token_items: Shape (S,). Index of the item of each traced token.
        token_positions: Shape (S,). Place of the token in its response, from 0.
        token_ids: Shape (S,). The token.
        token_losses: Shape (P, S). Its loss.
    """

    cell: AnalysedCell
    steps: IntArray
    items: tuple[str, ...]
    roles: tuple[str, ...]
    losses: FloatArray
    token_items: IntArray
    token_positions: IntArray
    token_ids: IntArray
    token_losses: FloatArray

    @property
    def is_task(self) -> npt.NDArray[np.bool_]:
        """Shape (N,). Whether an item belongs to the task."""
        return np.asarray([role == "task" for role in self.roles], dtype=bool)


def read_trace(cell: AnalysedCell) -> CellTrace | None:
    """The losses of a cell over its training, or None for an arm without training.

    A run of an older version has no losses of single tokens: then S is 0.

    Raises:
        AnalysisError: Files are missing, or the losses do not belong to the probe items.
    """
    if cell.trained is None:
        return None
    items = read_lines(cell.mixed / "probe_items.jsonl")
    arrays = _read_arrays(cell.trained / "probe.npz")
    steps, losses = arrays["steps"], arrays["losses"]
    if losses.shape != (len(steps), len(items)):
        raise AnalysisError(
            f"cell {cell.name}: probe losses of shape {losses.shape}, expected {len(steps)} steps"
            f" by {len(items)} probe items. Remove {cell.trained} and run again."
        )
    examples = arrays.get("token_examples", np.empty(0)).astype(np.int64)
    positions = arrays.get("token_positions", np.empty(0)).astype(np.int64)
    token_losses = arrays.get("token_losses", np.empty((len(steps), 0)))
    return CellTrace(
        cell=cell,
        steps=steps,
        items=tuple(item["item_id"] for item in items),
        roles=tuple(item["role"] for item in items),
        losses=losses,
        token_items=examples,
        token_positions=positions,
        token_ids=_token_ids(cell.mixed / "probe.safetensors", examples, positions),
        token_losses=token_losses.astype(np.float64),
    )


def trace_cell(cell: AnalysedCell) -> dict[str, Any] | None:
    """The entry of a cell in emergence.json, or None for an arm without training.

    Raises:
        AnalysisError: As `read_trace`.
    """
    trace = read_trace(cell)
    if trace is None:
        return None
    return emergence_of_cell(trace.steps, trace.losses, trace.items, trace.roles)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise AnalysisError(
            f"cannot read {path}: {error}. Run the experiment again; only what is missing is done."
        ) from error


def _token_ids(path: Path, examples: IntArray, positions: IntArray) -> IntArray:
    if not len(examples):
        return np.empty(0, dtype=np.int64)
    encoded = EncodedExamples.load(path)
    places = encoded.offsets[examples] + encoded.response_starts[examples] + positions
    return np.asarray(encoded.tokens[places], dtype=np.int64)


def write_traces(cells: Iterable[AnalysedCell], path: Path) -> int:
    """Write the losses of single tokens of all cells: one row per cell, step, item and token.

    One cell is in memory at a time. Nothing is written, and an old file removed, where no cell
    has such losses.

    Args:
        cells: Finished cells.
        path: Parquet file to replace.

    Returns:
        Number of rows.

    Raises:
        AnalysisError: A file of a cell is missing or damaged.
        StoreError: The disk is full or not writable.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    num_rows = 0
    with explain_disk_errors(path):
        with pq.ParquetWriter(aside, TRACES_SCHEMA, compression="zstd") as writer:
            for cell in cells:
                trace = read_trace(cell)
                if trace is not None and trace.token_losses.size:
                    writer.write_table(_table(trace))
                    num_rows += trace.token_losses.size
        if num_rows:
            aside.replace(path)
        else:
            aside.unlink()
            path.unlink(missing_ok=True)
    return num_rows


def _table(trace: CellTrace) -> pa.Table:
    """All rows of one cell, step by step: P x S of them."""
    cell, num_steps, num_tokens = trace.cell, *trace.token_losses.shape
    num_rows = num_steps * num_tokens
    items = np.tile(trace.token_items, num_steps).astype(np.int32)
    roles = sorted(set(trace.roles))
    role_of_item = [roles.index(role) for role in trace.roles]
    columns = [
        _constant(cell.name, num_rows),
        _constant(cell.arm, num_rows),
        pa.repeat(pa.scalar(cell.task_budget_tokens, pa.int64()), num_rows),
        pa.repeat(pa.scalar(cell.general_budget_tokens, pa.int64()), num_rows),
        pa.repeat(pa.scalar(cell.seed, pa.int64()), num_rows),
        np.repeat(trace.steps, num_tokens),
        pa.DictionaryArray.from_arrays(items, list(trace.items)),
        pa.DictionaryArray.from_arrays(np.asarray(role_of_item, dtype=np.int32)[items], roles),
        np.tile(trace.token_positions, num_steps).astype(np.int32),
        np.tile(trace.token_ids, num_steps).astype(np.int32),
        trace.token_losses.ravel().astype(np.float32),
    ]
    return pa.table(columns, schema=TRACES_SCHEMA)


def _constant(value: str, num_rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(num_rows, dtype=np.int32), [value])
