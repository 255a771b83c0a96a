"""Run the cells of an experiment that the predictions read, test the predictions, print the table.

The full grid of `configs/emergence_demo.yaml` has 271 cells, of which P1 to P7 read 67: `tell` and
`sft_matched` over all general budgets at the smallest task budget, `sft` at every task budget, and
the other arms at the largest general budget alone.

    python benchmarks/emergence.py configs/emergence_demo.yaml --set world=DIRECTORY --out DIRECTORY
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tell_core.analysis.summary import analyse_run
from tell_core.pipeline import CellOutcome, Stage, curate_stage, run_cell
from tell_core.results import open_run, write_results, write_spec
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec

OVER_GENERAL = ("tell", "sft_matched")


def cells_that_predictions_read(spec: ExperimentSpec) -> list[Cell]:
    """The cells of the grid that P1 to P7 are computed from."""
    task, general = min(spec.budgets.task_tokens), max(spec.budgets.general_tokens)
    return [
        cell
        for cell in plan_cells(spec)
        if cell.arm == "sft"
        or (
            cell.task_budget_tokens in (None, task)
            and (cell.arm in OVER_GENERAL or cell.general_budget_tokens in (None, general))
        )
    ]


def run_cells(spec: ExperimentSpec, root: Path, num_workers: int) -> None:
    """Train and evaluate the cells; what is finished is reused."""
    open_run(spec, root)
    write_spec(spec, root)
    curated = curate_stage(spec, root)
    cells = cells_that_predictions_read(spec)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_outcome, spec, cell, curated) for cell in cells]
        outcomes = []
        for done, future in enumerate(running, start=1):
            outcomes.append(future.result())
            print(f"{done} of {len(cells)}: {outcomes[-1].cell.label}", flush=True)
    write_results(spec, root, curated, outcomes, {})
    analyse_run([outcome.record() for outcome in outcomes], spec, root)


def _outcome(spec: ExperimentSpec, cell: Cell, curated: Stage) -> CellOutcome:
    return run_cell(spec, cell, curated, spec.training.candidates[0])


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    started = time.perf_counter()
    run_cells(load_spec(given.spec, given.settings), given.out, given.workers)
    print(f"trained and evaluated in {time.perf_counter() - started:.0f} s")
    from tell_core.analysis.predictions import measure_predictions

    for row in measure_predictions(given.out)["predictions"]:
        print(row["prediction"], row["verdict"], row["estimate"], row["p_holm"], row["reason"])


if __name__ == "__main__":
    main()
