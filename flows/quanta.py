"""Quanta of a run or a model: find them, draw the page, say what was found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tell_core.analysis.quanta.discovery import DiscoverySettings, Progress
from tell_core.analysis.quanta.stage import Found, default_cell, quanta_of_cell, quanta_of_model
from tell_core.errors import InputError
from tell_core.report.inspector import write_inspector
from tell_core.results import sole_owner
from tell_core.store import read_json

_SHOWN_CLUSTERS = 12


def find_quanta(
    source: str,
    settings: DiscoverySettings,
    *,
    cell: str | None = None,
    files: Sequence[str] = (),
    out: Path = Path("runs/quanta"),
    max_tokens: int = 256,
    max_examples: int = 400,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the candidate quanta of a cell or a model and draw the page that shows them.

    Args:
        source: Directory of a finished run, or a model's directory or hub id.
        settings: How to look.
        cell: Cell of a run; by default `tell` at its largest budgets.
        files: Files of examples; needed for a model, and only there.
        out: Where the quanta of a model go.
        max_tokens: Longest example, for a model.
        max_examples: Most examples, for a model.
        on_progress: Called with phase, done and total.

    Returns:
        The verdict, counts of tokens, the largest clusters, and where stage and page are.

    Raises:
        InputError: A model without examples, or a run with some.
    """
    is_run = (Path(source) / "manifest.json").exists()
    if is_run == bool(files):
        raise InputError(
            f"{source} is a run: its own items are looked at, leave out --data"
            if is_run
            else f"{source} is no finished run; for a model give examples with --data FILE"
        )
    root = Path(source) if is_run else out
    root.mkdir(parents=True, exist_ok=True)
    with sole_owner(root):
        if is_run:
            found = quanta_of_cell(root, cell or default_cell(root), settings, on_progress)
        else:
            found = quanta_of_model(
                source, files, root, settings,
                max_tokens=max_tokens, max_examples=max_examples, on_progress=on_progress,
            )  # fmt: skip
        page = write_inspector(root, found.name)
    return _answer(found, page)


def _answer(found: Found, page: Path) -> dict[str, Any]:
    clusters = read_json(found.path / "clusters.json")
    return {
        "name": found.name,
        "verdict": found.summary["verdict"],
        "tokens": found.summary["tokens"],
        "clusters": [_row(cluster) for cluster in clusters[:_SHOWN_CLUSTERS]],
        "stage": str(found.path),
        "page": str(page),
        "reused": found.reused,
    }


def _row(cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        "cluster": cluster["label"],
        "tokens": cluster["size"],
        "items": cluster["num_items"],
        "task tokens": cluster["roles"].get("task", 0),
        "cohesion": round(cluster["cohesion"], 2),
        "outputs": " ".join(f"{text!r}×{count}" for text, count in cluster["outputs"]),
    }
