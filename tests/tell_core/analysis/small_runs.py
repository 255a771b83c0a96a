"""Finished runs with simulated losses: what the predictions are read from, nothing trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.simulated_curves import spaced_steps
from tell_core.evaluation.base import GENERAL_ITEMS_FILE
from tell_core.evaluation.metrics import build_metrics
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.model import ExperimentSpec

GENERAL_BUDGETS = (200, 350, 600, 1050, 1800, 3100, 5400, 9400)
NUM_TEST, NUM_TASK, NUM_GENERAL = 30, 12, 24
STEPS = spaced_steps(16, last=200)
SKILLS = {"a": 0.4, "b": 0.2, "c": 0.15, "d": 0.1, "e": 0.05, "f": 0.025}

Losses = Callable[[Cell, np.random.Generator], FloatArray]


def fall(log_middle: FloatArray | float, sharpness: float = 4.0) -> FloatArray:
    """Losses (P, U) of units that fall from 2 nats around exp(log_middle) steps."""
    place = np.atleast_1d(np.asarray(log_middle, dtype=np.float64))
    time = np.log1p(STEPS)[:, None]
    return np.asarray(2 / (1 + np.exp(sharpness * (time - place))))


@dataclass(frozen=True)
class World:
    """How losses come about.

    Attributes:
        test: Loss of the test items of a cell, shape (NUM_TEST,).
        task: Losses of the task's probe items, shape (P, NUM_TASK); the first half is shared.
        general: Losses of the general probe items, shape (P, NUM_GENERAL).
        general_test: Loss of the held-out general items of a cell; none are there by default.
    """

    test: Losses
    task: Losses
    general: Losses
    general_test: Losses | None = None


def quantum_world(cell: Cell, generator: np.random.Generator) -> FloatArray:
    """Shared units fall the earlier the more general data, specific ones with task data alone."""
    log_general = np.log(cell.general_budget_tokens or 1)
    never = 50.0
    shared = 6.5 - 0.5 * log_general if cell.arm != "sft" else never
    specific = never if cell.arm == "general_only" else 4.0
    middles = np.repeat([shared, specific], NUM_TASK // 2)
    return fall(middles + generator.normal(0, 0.2, NUM_TASK))


def by_use(cell: Cell, generator: np.random.Generator) -> FloatArray:
    """General items fall at a time proportional to the use of their skill ** -0.8."""
    log_use = np.log([SKILLS[label] for label in labels()])
    return fall(0.5 - 0.8 * log_use + generator.normal(0, 0.15, NUM_GENERAL))


def labels() -> list[str]:
    """Skill of each general probe item."""
    return [list(SKILLS)[place % len(SKILLS)] for place in range(NUM_GENERAL)]


def stepping_tests(cell: Cell, generator: np.random.Generator) -> FloatArray:
    """Test items of TELL fall in a step around 1,000 general tokens, those of SFT stay."""
    middles = np.log(1000) + np.linspace(-0.5, 0.5, NUM_TEST)
    if not cell.arm.startswith("tell"):
        return 2 + generator.normal(0, 0.05, NUM_TEST)
    place = np.log(cell.general_budget_tokens or 1)
    return 0.2 + 1.8 / (1 + np.exp(5 * (place - middles))) + generator.normal(0, 0.05, NUM_TEST)


def smooth_tests(cell: Cell, generator: np.random.Generator) -> FloatArray:
    """Test items of TELL fall in a line over log general tokens."""
    place = np.log(cell.general_budget_tokens or 1)
    slope = 0.3 if cell.arm.startswith("tell") else 0.0
    return 4 - slope * place + generator.normal(0, 0.05, NUM_TEST)


def run_spec(**changes: object) -> ExperimentSpec:
    """An experiment with eight general budgets."""
    fields = {
        "name": "simulated",
        "model": {"id": "none"},
        "task": {"name": "task", "train": "train.jsonl", "test": "test.jsonl"},
        "general": ["general.jsonl"],
        "budgets": {"task_tokens": [480], "general_tokens": list(GENERAL_BUDGETS)},
        "arms": ["sft", "sft_matched", "tell", "tell_blocks(4)", "general_only"],
        "seeds": [0, 1, 2],
        "evaluation": {"metrics": []},
        "analysis": {"bootstrap_draws": 400, "quantum_column": "skill"},
    }
    return ExperimentSpec.model_validate(fields | changes)


def write_run(
    root: Path, spec: ExperimentSpec, world: World
) -> tuple[RunCells, tuple[AnalysedCell, ...]]:
    """Write the stages of all cells and read them as a run."""
    found = tuple(
        _write_cell(root, cell, world, np.random.default_rng(number))
        for number, cell in enumerate(plan_cells(spec))
    )
    return RunCells.read(spec, found, build_metrics(spec.evaluation)), found


def _write_cell(
    root: Path, cell: Cell, world: World, generator: np.random.Generator
) -> AnalysedCell:
    directory = root / cell.name
    directory.mkdir(parents=True)
    _write_losses(directory / "predictions.jsonl", "log_probability", world.test(cell, generator))
    if world.general_test is not None:
        losses = world.general_test(cell, generator)
        _write_losses(directory / GENERAL_ITEMS_FILE, "general_log_probability", losses)
    (directory / "scores.json").write_text("{}")
    task, general = world.task(cell, generator), world.general(cell, generator)
    losses = np.concatenate([task, general], axis=1)
    np.savez(directory / "probe.npz", steps=STEPS.astype(np.int64), losses=losses)
    items = [{"item_id": f"dev-{n}", "role": "task", "extra": {}} for n in range(NUM_TASK)]
    items += [
        {"item_id": f"general-{n}", "role": "general", "extra": {"skill": label}}
        for n, label in enumerate(labels())
    ]
    _write_lines(directory / "probe_items.jsonl", items)
    return AnalysedCell(
        cell.name, cell.arm, cell.task_budget_tokens, cell.general_budget_tokens, cell.seed,
        cell.task_budget_tokens or 0, directory, directory, directory,
    )  # fmt: skip


def _write_losses(path: Path, metric: str, losses: FloatArray) -> None:
    rows = [
        {"item_id": f"item-{n}", "nll": 2 * loss, "num_tokens": 2, "stats": {metric: [-loss]}}
        for n, loss in enumerate(losses.tolist())
    ]
    _write_lines(path, rows)


def one_seed_of(run: RunCells) -> RunCells:
    """The run with its first seed alone."""
    cells = tuple(cell for cell in run.cells if cell.seed == 0)
    return replace(run, cells=cells)


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


QUANTUM = World(stepping_tests, quantum_world, by_use)
