"""The flow of the cells: tuning first, then every cell, side by side."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from prefect import flow
from prefect.futures import PrefectFuture, as_completed

from flows.runners import LOCAL, open_runner
from tasks.cell_news import tell_failed, tell_finished
from tasks.progress import DONE, announce, announce_total
from tasks.stages import choose_round, run_cell, tune_arm
from tell_core.analysis.adaptive import Round, contest
from tell_core.errors import TellError
from tell_core.lanes import stop_lanes
from tell_core.pipeline import CellOutcome, Stage
from tell_core.spec.cells import Cell, plan_cells, tuning_cells
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
            partial(_tell_tuned, comparisons, is_remote),
        )
        tuning = {cell.arm: table for cell, table in zip(comparisons, tables, strict=True)}
        while step := _next(compared, outcomes, is_adaptive=is_adaptive):
            rounds.append(step)
            announce_total(sum(len(step.cells) for step in rounds) + len(comparisons))
            outcomes += gather(
                [run_cell.submit(spec, cell, curated, tuning) for cell in step.cells],
                partial(_tell_ended, step.cells, is_remote),
            )
    except BaseException:
        # Before the task runner joins its threads, which wait for the lanes. An interruption, a
        # cancellation or the end of the flow's time, which Prefect raises as no Exception.
        stop_lanes()
        raise
    return outcomes, tuning, rounds


def _next(
    spec: ExperimentSpec, outcomes: Sequence[CellOutcome], *, is_adaptive: bool
) -> Round | None:
    if is_adaptive:
        return choose_round(spec, outcomes)
    return None if outcomes else Round(plan_cells(spec), "the full grid")


def _tell_tuned(
    cells: Sequence[Cell], is_remote: bool, place: int, table: dict[str, Any] | None
) -> None:
    if is_remote and table is not None:
        announce(f"tuning · {cells[place].label}", DONE, 1, 1)


def _tell_ended(
    cells: Sequence[Cell], is_remote: bool, place: int, outcome: CellOutcome | None
) -> None:
    """Tell of a cell's end; other machines have no listeners of their own to announce it."""
    if outcome is None:
        tell_failed(cells[place])
        return
    tell_finished(outcome)
    if is_remote:
        announce(cells[place].label, DONE, 1, 1)


def gather(futures: Sequence[PrefectFuture[T]], ended: Callable[[int, T | None], None]) -> list[T]:
    """Wait for all, also when one fails: what the others finish need not be done again.

    Args:
        futures: What was submitted.
        ended: Told of each as it ends: its place, and its result or None when it failed.

    Raises:
        TellError: The first failure, when it was one of ours; else whatever was raised.
    """
    places = {future.task_run_id: place for place, future in enumerate(futures)}
    for future in as_completed(list(futures)):
        future.wait()
        is_completed = future.state.is_completed()
        ended(places[future.task_run_id], future.result() if is_completed else None)
    failures = [future.state for future in futures if not future.state.is_completed()]
    for failure in failures:
        failure.result()
    if failures:
        raise TellError(f"{len(failures)} of {len(futures)} cells did not finish")
    return [future.result() for future in futures]
