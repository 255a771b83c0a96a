"""The table of predictions P1 to P7 of a finished run, and the learning orders behind it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tell_core.analysis.anchor_effect import anchor_mediates
from tell_core.analysis.data_order import shuffle_beats_order
from tell_core.analysis.data_steps import emergence_with_data
from tell_core.analysis.directions import specific_directions
from tell_core.analysis.finished import finished_run
from tell_core.analysis.group_order import shared_before_specific
from tell_core.analysis.learning_orders import learning_orders
from tell_core.analysis.leverage_claim import leverage_above_one
from tell_core.analysis.registration import SPLIT_FILE, Split, register_split
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.run_scaling import SCALING_FILE, measure_scaling
from tell_core.analysis.use_frequency import time_by_frequency
from tell_core.analysis.verdicts import Finding, judge, unmeasured
from tell_core.errors import AnalysisError
from tell_core.evaluation.metrics import build_metrics
from tell_core.store import read_json, write_json

QUANTA_DIRECTORY = "quanta"
PREDICTIONS_FILE = "predictions.json"
SEQUENCE_FILE = "sequence.json"
Progress = Callable[[str, int, int], None]


def measure_predictions(root: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Test P1 to P7 on a finished run.

    The split into shared and specific units is registered first, in ``quanta/split.json``. Written
    are ``quanta/predictions.json`` (the table, with the numbers of its figures),
    ``quanta/sequence.json`` (learning orders) and ``quanta/scaling.json`` (how the loss scales).

    Args:
        root: Directory of a finished run.
        on_progress: Called with the name of what is measured, how much is done and of how much.

    Returns:
        The content of predictions.json.

    Raises:
        InputError: There is no finished run.
        AnalysisError: Files of the run are missing or do not belong together.
    """
    spec, cells = finished_run(root)
    split = _split(root, cells)
    run = RunCells.read(spec, cells, build_metrics(spec.evaluation))
    curated = root / "stages" / read_json(root / "manifest.json")["stages"]["curate"]
    measures: Mapping[str, Callable[[], Finding]] = {
        "P1": lambda: emergence_with_data(run),
        "P2": lambda: _order_of_groups(run, split),
        "P3": lambda: time_by_frequency(run, curated),
        "P4": lambda: anchor_mediates(run),
        "P5": lambda: shuffle_beats_order(run),
        "P6": lambda: leverage_above_one(run, read_json(root / "leverage.json")),
        "P7": lambda: _directions_of_groups(run, split, root, on_progress),
    }
    findings = []
    for done, (prediction, measure) in enumerate(measures.items(), start=1):
        findings.append(_measured(prediction, measure))
        if on_progress:
            on_progress("predictions", done, len(measures))
    table = {
        "confidence": spec.analysis.confidence,
        "primary_metric": spec.analysis.primary_metric,
        "task_budget_tokens": run.task_budget,
        "general_budget_tokens": run.general_budget,
        "split": split.digest if isinstance(split, Split) else None,
        "predictions": judge(findings, spec.analysis.confidence),
    }
    directory = root / QUANTA_DIRECTORY
    directory.mkdir(exist_ok=True)
    registered = split if isinstance(split, Split) else None
    write_json(directory / SEQUENCE_FILE, learning_orders(run, registered))
    write_json(directory / SCALING_FILE, measure_scaling(run, curated))
    write_json(directory / PREDICTIONS_FILE, table)
    return table


def _measured(prediction: str, measure: Callable[[], Finding]) -> Finding:
    """What a measure finds; undetermined, with the reason, where these data cannot answer it."""
    try:
        return measure()
    except AnalysisError as error:
        return unmeasured(prediction, str(error))


def _split(root: Path, cells: Any) -> Split | str:
    """The registered split, or why there is none."""
    try:
        return register_split(cells, root / QUANTA_DIRECTORY / SPLIT_FILE)
    except AnalysisError as error:
        return str(error)


def _order_of_groups(run: RunCells, split: Split | str) -> Finding:
    if isinstance(split, str):
        return unmeasured("P2", split)
    return shared_before_specific(run, split)


def _directions_of_groups(
    run: RunCells, split: Split | str, root: Path, on_progress: Progress | None
) -> Finding:
    if isinstance(split, str):
        return unmeasured("P7", split)
    return specific_directions(run, split, root, on_progress)
