"""The flow of the cells: tuning first, then every cell, side by side."""

from collections.abc import Sequence
from typing import Any, TypeVar

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture

from flows.runners import LOCAL, open_runner
from tasks.progress import DONE, announce, announce_total
from tasks.stages import choose_round, run_cell, tune_arm
from tell_core.analysis.adaptive import Round, contest
from tell_core.errors import TellError
from tell_core.lanes import stop_lanes
from tell_core.pipeline import CellOutcome, Stage
from tell_core.spec.cells import plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec

T = TypeVar("T")


def run_cells(
    spec: ExperimentSpec, curated: Stage, *, is_adaptive: bool, runner: str = LOCAL
) -> tuple[list[CellOutcome], dict[str, Any], list[Round]]:
    """Tune each arm, then mix, train and evaluate the cells, one at a time on each worker.

    Args:
        spec: The experiment.
        curated: Its data.
        is_adaptive: Run only the cells that the answer needs, in rounds; else all in one round.
        runner: Where they are computed, see `flows.runners`.

    Returns:
        The outcome of every cell, the tuning table by arm, and the rounds.
    """
    with open_runner(runner, spec.training) as opened:
        is_remote = runner != LOCAL
        return cells_flow.with_options(task_runner=opened)(spec, curated, is_adaptive, is_remote)


@flow(name="cells", flow_run_name="cells · {spec.name}", validate_parameters=False)
def cells_flow(
    spec: ExperimentSpec, curated: Stage, is_adaptive: bool, is_remote: bool = False
) -> tuple[list[CellOutcome], dict[str, Any], list[Round]]:
    """Submit the tuning of every arm, wait, then submit the cells, round by round."""
    compared = contest(spec) if is_adaptive else spec
    comparisons = tuning_cells(compared)
    rounds: list[Round] = []
    outcomes: list[CellOutcome] = []
    try:
        announce_total(len(comparisons) + (0 if is_adaptive else len(plan_cells(spec))))
        tables = gather(
            [tune_arm.submit(spec, cell, curated) for cell in comparisons],
            [f"tuning · {cell.label}" for cell in comparisons] if is_remote else None,
        )
        tuning = {cell.arm: table for cell, table in zip(comparisons, tables, strict=True)}
        while step := _next(compared, outcomes, is_adaptive=is_adaptive):
            rounds.append(step)
            announce_total(sum(len(step.cells) for step in rounds) + len(comparisons))
            outcomes += gather(
                [run_cell.submit(spec, cell, curated, tuning) for cell in step.cells],
                [cell.label for cell in step.cells] if is_remote else None,
            )
    except (KeyboardInterrupt, TerminationSignal):
        # Before the task runner joins its threads, which wait for the lanes.
        stop_lanes()
        raise
    return outcomes, tuning, rounds


def _next(
    spec: ExperimentSpec, outcomes: Sequence[CellOutcome], *, is_adaptive: bool
) -> Round | None:
    if is_adaptive:
        return choose_round(spec, outcomes)
    return None if outcomes else Round(plan_cells(spec), "the full grid")


def gather(futures: Sequence[PrefectFuture[T]], labels: Sequence[str] | None = None) -> list[T]:
    """Wait for all, also when one fails: what the others finish need not be done again.

    Args:
        futures: What was submitted.
        labels: What the listeners of this process are told of each that is done; for tasks of
            other machines, which have no listeners of their own.

    Raises:
        TellError: The first failure, when it was one of ours; else whatever was raised.
    """
    for place, future in enumerate(futures):
        future.wait()
        if labels and future.state.is_completed():
            announce(labels[place], DONE, 1, 1)
    failures = [future.state for future in futures if not future.state.is_completed()]
    for failure in failures:
        failure.result()
    if failures:
        raise TellError(f"{len(failures)} of {len(futures)} cells did not finish")
    return [future.result() for future in futures]
