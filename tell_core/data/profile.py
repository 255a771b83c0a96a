"""Profile: what each source held, what was set aside and why, and how long its examples are."""

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from tell_core.data.encoding import IntArray
from tell_core.data.filters import likeliest_languages
from tell_core.data.reading import Layout
from tell_core.data.sources import ResolvedSource
from tell_core.data.workspace import fetch_all, fetch_one
from tell_core.spec.identity import file_digest, fingerprint

LANGUAGE_EXAMPLES = 200
_FIRST_EDGE = 16


def profile_source(
    connection: duckdb.DuckDBPyConnection,
    source: ResolvedSource,
    source_id: int,
    layout: Layout,
) -> dict[str, Any]:
    """Counts, reject reasons, token lengths and languages of one source, after curation.

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
    lengths = connection.execute(
        "select num_tokens, num_response_tokens from encoded join examples using (id)"
        " where source_id = ?",
        [source_id],
    ).fetchnumpy()
    tokens = np.asarray(lengths["num_tokens"], dtype=np.int64)
    response_tokens = np.asarray(lengths["num_response_tokens"], dtype=np.int64)
    files = _files(source, layout)
    assert num_read == len(tokens) + sum(rejects.values()), f"rows of {source.key} were lost"
    return {
        "name": source.spec.name,
        "role": source.role,
        "files": files,
        "fingerprint": fingerprint([[Path(file["path"]).name, file["sha256"]] for file in files]),
        "format": layout.format,
        "format_given": source.spec.format,
        "columns": layout.columns,
        "num_read": num_read,
        "num_kept": len(tokens),
        "rejects": rejects,
        "num_tokens": int(tokens.sum()),
        "num_response_tokens": int(response_tokens.sum()),
        **_spread(tokens),
        "response_histogram": _histogram(response_tokens),
        "languages": _languages(connection, source_id),
    }


def _languages(connection: duckdb.DuckDBPyConnection, source_id: int) -> dict[str, int] | None:
    """How many of at most 200 kept examples are in which language; None where none can be told.

    The examples are those with the smallest md5 of their ids; those of fewer than 20 words are
    not counted.
    """
    rows = fetch_all(
        connection,
        "select concat_ws(chr(10), prompt, response) from examples where source_id = ?"
        " order by md5(example_id), id limit ?",
        [source_id, LANGUAGE_EXAMPLES],
    )
    found = likeliest_languages([text for (text,) in rows])
    return None if found is None else dict(Counter(found).most_common())


def _files(source: ResolvedSource, layout: Layout) -> list[dict[str, Any]]:
    """What was read; a hub dataset is told by its commit."""
    if source.is_hub:
        name = f"{source.spec.path}@{source.spec.split}"
        return [{"path": name, "sha256": layout.revision, "bytes": None}]
    return [
        {"path": str(path), "sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in source.files
    ]


def _spread(tokens: IntArray) -> dict[str, Any]:
    """Percentiles and a histogram."""
    if not len(tokens):
        nothing = {"tokens_p50": None, "tokens_p95": None, "tokens_max": None}
        return nothing | {"histogram": _histogram(tokens)}
    p50, p95 = np.percentile(tokens, [50, 95], method="lower")
    return {
        "tokens_p50": int(p50),
        "tokens_p95": int(p95),
        "tokens_max": int(tokens.max()),
        "histogram": _histogram(tokens),
    }


def _histogram(tokens: IntArray) -> dict[str, list[int]]:
    """How many lengths lie between edges that double from 16 tokens on."""
    edges = [0, _FIRST_EDGE]
    while len(tokens) and edges[-1] <= tokens.max():
        edges.append(2 * edges[-1])
    return {"edges": edges, "counts": np.histogram(tokens, edges)[0].tolist()}
