"""Profile: what each source held, what was set aside and why, and how long its examples are."""

from typing import Any

import duckdb
import numpy as np

from tell_core.data.reading import Layout
from tell_core.data.sources import ResolvedSource
from tell_core.data.workspace import fetch_all, fetch_one
from tell_core.spec.identity import file_digest

_FIRST_EDGE = 16


def profile_source(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    source_id: int,
    layout: Layout,
) -> dict[str, Any]:
    """Counts, reject reasons and token lengths of one source, after curation.

    Kept are the examples of all parts that the source went into: what was carved out of it for
    dev or held-out items counts as kept.
    """
    num_read = fetch_one(
        connection, "select num_read from sources where source_id = ?", [source_id]
    )
    rejects = dict(
        fetch_all(
            connection,
            "select reason, count(*) from rejects where source_id = ? group by reason"
            " order by reason",
            [source_id],
        )
    )
    lengths = fetch_all(
        connection,
        "select num_tokens, num_response_tokens from encoded join examples using (id)"
        " where source_id = ?",
        [source_id],
    )
    tokens = np.asarray([length for length, _ in lengths], dtype=np.int64)
    assert num_read == len(tokens) + sum(rejects.values()), f"rows of {source.key} were lost"
    return {
        "name": source.spec.name,
        "role": source.role,
        "files": _files(source, layout),
        "format": layout.format,
        "format_given": source.spec.format,
        "columns": layout.columns,
        "num_read": num_read,
        "num_kept": len(tokens),
        "rejects": rejects,
        "num_tokens": int(tokens.sum()),
        "num_response_tokens": sum(length for _, length in lengths),
        **_spread(tokens),
    }


def _files(source: ResolvedSource, layout: Layout) -> list[dict[str, Any]]:
    """What was read; a hub dataset is told by its commit."""
    if source.is_hub:
        name = f"{source.spec.path}@{source.spec.split}"
        return [{"path": name, "sha256": layout.revision, "bytes": None}]
    return [
        {"path": str(path), "sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in source.files
    ]


def _spread(tokens: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Any]:
    """Percentiles, and a histogram whose edges double."""
    if not len(tokens):
        empty = {"edges": [0, _FIRST_EDGE], "counts": [0]}
        return {"tokens_p50": None, "tokens_p95": None, "tokens_max": None, "histogram": empty}
    edges = [0, _FIRST_EDGE]
    while edges[-1] <= tokens.max():
        edges.append(2 * edges[-1])
    p50, p95 = np.percentile(tokens, [50, 95], method="lower")
    return {
        "tokens_p50": int(p50),
        "tokens_p95": int(p95),
        "tokens_max": int(tokens.max()),
        "histogram": {"edges": edges, "counts": np.histogram(tokens, edges)[0].tolist()},
    }
