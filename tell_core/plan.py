"""What an experiment will do, before it does it: cells, exact tokens, steps, time and disk."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tell_core.data.mixtures import plan_cell
from tell_core.pipeline import Stage, check_references_of, context_of, renderer_of
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.training.devices import cpu_threads, resolve_device, resolve_precision
from tell_core.training.models import check_weights, resolve_model

# Floating-point operations per parameter and token: 2 forward, 2 backward to the activations, and 2
# more to the weights where all of them are trained.
_FLOP_PER_PARAMETER_TOKEN = {"lora": 4, "full": 6}
# Share of a matrix product's speed that training reached on one CPU thread: 0.38 for SmolLM2-135M
# (LoRA, bfloat16), 0.23 for the demo's 0.3 M parameters.
_EFFICIENCY = 0.35


@dataclass(frozen=True)
class CellPlan:
    """One cell before it runs.

    Attributes:
        cell: The cell.
        ledger: Its token ledger, equal to the one the run will write.
        num_trainings: 1, or the number of learning rates compared, or 0.
        is_tuning: Whether it only serves the choice of the learning rate.
    """

    cell: Cell
    ledger: dict[str, Any]
    num_trainings: int
    is_tuning: bool


@dataclass(frozen=True)
class Plan:
    """An experiment before it runs.

    Attributes:
        cells: Every cell, tuning first.
        training_seconds: Estimate for all trainings one after another, from the speed of
            matrix products on this machine; evaluation comes on top.
        disk_bytes: Estimate of what the run directory will hold.
    """

    cells: tuple[CellPlan, ...]
    training_seconds: float
    disk_bytes: int

    @property
    def rendered_tokens(self) -> int:
        """Tokens of all trainings, all epochs."""
        return sum(plan.ledger["rendered_tokens"] * plan.num_trainings for plan in self.cells)


def make_plan(spec: ExperimentSpec, curated: Stage) -> Plan:
    """Draw every cell's budgets from the curated data and count; nothing is trained.

    Raises:
        InputError: A budget holds no example, an example exceeds the model's context, or a
            reference does not fit a metric.
    """
    check_references_of(spec, curated)
    cells = [
        *(_plan(spec, cell, curated, is_tuning=True) for cell in tuning_cells(spec)),
        *(_plan(spec, cell, curated, is_tuning=False) for cell in plan_cells(spec)),
    ]
    directory = resolve_model(spec.model.id, spec.model.revision)
    check_weights(directory)
    parameters = _num_parameters(directory)
    tokens = sum(plan.ledger["rendered_tokens"] * plan.num_trainings for plan in cells)
    flop = tokens * parameters * _FLOP_PER_PARAMETER_TOKEN[spec.training.method]
    return Plan(
        cells=tuple(cells),
        training_seconds=flop / (_matrix_flops(spec) * _EFFICIENCY),
        disk_bytes=_disk_bytes(spec, cells, parameters),
    )


def _plan(spec: ExperimentSpec, cell: Cell, curated: Stage, *, is_tuning: bool) -> CellPlan:
    ledger = plan_cell(spec, cell, curated.path, renderer_of(spec), context_of(spec))
    trainings = len(spec.training.learning_rates) if is_tuning else 1
    is_trained = parse_arm(cell.arm).is_trained
    return CellPlan(cell, ledger, trainings if is_trained else 0, is_tuning)


def _num_parameters(directory: Path) -> int:
    """Parameters of a model, from the headers of its weight files."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _matrix_flops(spec: ExperimentSpec) -> float:
    """Measured speed of a matrix product as training will compute it, in FLOP per second."""
    device = resolve_device(spec.training.device)
    precision = resolve_precision(spec.model.dtype, device, spec.training.method)
    dtype = precision.compute or precision.weights
    size = 4096 if device.type == "cuda" else 512
    best = math.inf
    with cpu_threads(spec.training.threads):
        matrix = torch.randn(size, size, device=device).to(dtype)
        for _ in range(8):
            start = time.perf_counter()
            (matrix @ matrix).flatten()[0].item()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _disk_bytes(spec: ExperimentSpec, cells: Sequence[CellPlan], parameters: int) -> int:
    tokens = sum(
        (plan.ledger["task_rendered_tokens"] or 0) + (plan.ledger["general_tokens"] or 0)
        for plan in cells
    )
    share = 0.05 if spec.training.method == "lora" else 1.0
    weights = sum(plan.num_trainings for plan in cells) * int(parameters * share) * 4
    return 4 * tokens + weights


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row per cell for a table."""
    return [
        {
            "cell": ("tuning · " if entry.is_tuning else "") + entry.cell.label,
            "task tokens": entry.ledger["task_tokens"],
            "task examples": entry.ledger["num_task_examples"],
            "general tokens": entry.ledger["general_tokens"],
            "rendered tokens": entry.ledger["rendered_tokens"],
            "supervised tokens": entry.ledger["supervised_tokens"],
            "steps": entry.ledger["steps"],
            "trainings": entry.num_trainings,
        }
        for entry in plan.cells
    ]
