"""The quanta flow: candidate quanta of a run's cell or of a model, their page, their record."""

from typing import Any

from prefect import flow

from tasks.quanta import discover_in_cell, discover_in_model, draw_quanta, show_quanta
from tasks.stages import value_of
from tasks.tracking import track_quanta
from tell_core.analysis.quanta.discovery import DiscoverySettings
from tell_core.analysis.quanta.stage import Subject
from tell_core.results import sole_owner


@flow(name="quanta", flow_run_name="quanta · {subject.name}")
def run_quanta(
    subject: Subject,
    settings: DiscoverySettings,
    max_tokens: int = 256,
    max_examples: int = 400,
    track: bool = True,
) -> dict[str, Any]:
    """Find the candidate quanta, draw the page that shows them, record both with the run.

    Args:
        subject: A cell of a finished run, or a model and files of examples.
        settings: How to look.
        max_tokens: Longest example, for a model.
        max_examples: Most examples, for a model.
        track: Whether the MLflow run of the experiment gets page and clusters.

    Returns:
        The verdict, counts of tokens, the largest clusters, and where stage and page are.
    """
    root = subject.root
    with sole_owner(root):
        if subject.model is None:
            found = value_of(discover_in_cell(root, subject.name, settings))
        else:
            found = value_of(
                discover_in_model(
                    subject.model, subject.files, root, settings, max_tokens, max_examples
                )
            )
        page = draw_quanta(root, found.name)
        if track and subject.model is None:
            track_quanta(root, found, page)
    return show_quanta(found, page)
