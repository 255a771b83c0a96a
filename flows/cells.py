"""The flow of the cells: tuning first, then every cell, side by side in lanes."""

from collections.abc import Sequence
from typing import Any, TypeVar

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks.progress import announce_total
from tasks.stages import run_cell, tune_arm
from tell_core.errors import TellError
from tell_core.lanes import num_lanes, open_lanes, stop_lanes
from tell_core.pipeline import CellOutcome, Stage
from tell_core.spec.cells import plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec

T = TypeVar("T")


def run_cells(spec: ExperimentSpec, curated: Stage) -> tuple[list[CellOutcome], dict[str, Any]]:
    """Tune each arm, then mix, train and evaluate every cell, as many at once as there are lanes.

    Returns:
        The outcome of every cell, and the tuning table by arm.
    """
    lanes = num_lanes(spec.training.threads, spec.training.device)
    with open_lanes(lanes):
        runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=lanes)
        return cells_flow.with_options(task_runner=runner)(spec, curated)


@flow(name="cells", flow_run_name="cells · {spec.name}", validate_parameters=False)
def cells_flow(spec: ExperimentSpec, curated: Stage) -> tuple[list[CellOutcome], dict[str, Any]]:
    """Submit the tuning of every arm, wait, then submit every cell."""
    cells, comparisons = plan_cells(spec), tuning_cells(spec)
    announce_total(len(cells) + len(comparisons))
    try:
        tables = gather([tune_arm.submit(spec, cell, curated) for cell in comparisons])
        tuning = {cell.arm: table for cell, table in zip(comparisons, tables, strict=True)}
        outcomes = gather([run_cell.submit(spec, cell, curated, tuning) for cell in cells])
    except (KeyboardInterrupt, TerminationSignal):
        # Before the task runner joins its threads, which wait for the lanes.
        stop_lanes()
        raise
    return outcomes, tuning


def gather(futures: Sequence[PrefectFuture[T]]) -> list[T]:
    """Wait for all, also when one fails: what the others finish need not be done again.

    Raises:
        TellError: The first failure, when it was one of ours; else whatever was raised.
    """
    for future in futures:
        future.wait()
    failures = [future.state for future in futures if not future.state.is_completed()]
    for failure in failures:
        failure.result()
    if failures:
        raise TellError(f"{len(failures)} of {len(futures)} cells did not finish")
    return [future.result() for future in futures]
