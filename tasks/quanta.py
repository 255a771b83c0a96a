"""Prefect tasks of quanta discovery: look, draw the page, show what was found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.progress import ENDED, Watch, announce
from tell_core.analysis.quanta.discovery import DiscoverySettings
from tell_core.analysis.quanta.stage import Found, quanta_of_cell, quanta_of_model
from tell_core.lanes import ProgressFile
from tell_core.report.inspector import write_inspector
from tell_core.store import read_json

_SHOWN_CLUSTERS = 12


@task(name="discover quanta", task_run_name="discover · {cell}", cache_policy=NO_CACHE)
def discover_in_cell(root: Path, cell: str, settings: DiscoverySettings) -> Found | State[Found]:
    """Look at what a cell of a finished run has learned."""
    progress = _Progress(root, cell)
    found = quanta_of_cell(root, cell, settings, progress)
    return _told(found, progress)


@task(name="discover quanta", task_run_name="discover · {model}", cache_policy=NO_CACHE)
def discover_in_model(
    model: str,
    files: Sequence[str],
    root: Path,
    settings: DiscoverySettings,
    max_tokens: int,
    max_examples: int,
) -> Found | State[Found]:
    """Look at a model on files of examples."""
    progress = _Progress(root, Path(model).name)
    found = quanta_of_model(
        model, files, root, settings,
        max_tokens=max_tokens, max_examples=max_examples, on_progress=progress,
    )  # fmt: skip
    return _told(found, progress)


@task(name="draw quanta", task_run_name="draw · {name}", cache_policy=NO_CACHE)
def draw_quanta(root: Path, name: str) -> Path:
    """Draw the page on which the clusters are looked at."""
    return write_inspector(root, name)


@task(name="show quanta", task_run_name="show · {found.name}", cache_policy=NO_CACHE)
def show_quanta(found: Found, page: Path) -> dict[str, Any]:
    """The verdict, the counts, the largest clusters, and where the page is; also as a value."""
    summary = found.summary
    clusters = read_json(found.path / "clusters.json")[:_SHOWN_CLUSTERS]
    shown = {
        "name": found.name,
        "verdict": summary["verdict"],
        "tokens": summary["tokens"],
        "clusters": [_row(cluster) for cluster in clusters],
        "stage": str(found.path),
        "page": str(page),
        "reused": found.reused,
    }
    lines = [f"# Candidate quanta of {found.name}", shown["verdict"], f"Page: `{page.absolute()}`"]
    create_markdown_artifact(key="quanta", markdown="\n\n".join(lines))
    create_table_artifact(
        key="clusters", table=shown["clusters"], description="The largest clusters of gradients"
    )
    create_link_artifact(
        key="quanta-page", link=page.absolute().as_uri(), link_text=f"The clusters: {page}"
    )
    return shown


def _row(cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        "cluster": cluster["label"],
        "tokens": cluster["size"],
        "items": cluster["num_items"],
        "task tokens": cluster["roles"].get("task", 0),
        "cohesion": round(cluster["cohesion"], 2),
        "outputs": " ".join(f"{text!r}×{count}" for text, count in cluster["outputs"]),
    }


class _Progress:
    """Progress of a discovery: to the listeners, and as an artifact while it takes long."""

    def __init__(self, root: Path, name: str) -> None:
        self.label = f"quanta · {name}"
        self._file = ProgressFile(root / "progress" / f"quanta-{name}.json")
        self._watch = Watch(self.label, self._file)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` units of ``phase`` are finished."""
        self._file(phase, done, total)
        self._watch()

    def close(self, summary: str) -> None:
        """End the artifact with what came out."""
        self._watch.close(summary)
        announce(self.label, ENDED, 1, 1)


def _told(found: Found, progress: _Progress) -> Found | State[Found]:
    """Log what was found; what was there already is shown as reused."""
    summary = found.summary
    progress.close(summary["verdict"])
    get_run_logger().info(
        "%d tokens, %d clusters: %s",
        summary["tokens"]["chosen"], summary["num_clusters"], summary["verdict"],
    )  # fmt: skip
    if not found.reused:
        return found
    message = f"found finished: {found.path.name}"
    return Completed(name="Reused", message=message, data=found)
