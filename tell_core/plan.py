"""What an experiment will do, before it does it: cells, exact tokens, steps, time and disk."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tell_core.analysis.power import Noise, power_before_training
from tell_core.analysis.summary import LEVERAGE_FILE
from tell_core.cost import Cost, estimate_cost, num_parameters
from tell_core.data.mixtures import plan_cell, plan_positions
from tell_core.data.pools import open_pools
from tell_core.evaluation.metrics import build_metrics
from tell_core.pipeline import (
    Stage,
    check_references_of,
    context_of,
    gradients_for,
    renderer_of,
    settled,
)
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell, plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tell_core.training.attention import planned_limits
from tell_core.training.batching import BatchCounts, Limits, count_batches, needs_no_layout
from tell_core.training.models import check_weights, resolve_model, skeleton


@dataclass(frozen=True)
class CellPlan:
    """One cell before it runs.

    Attributes:
        cell: The cell.
        ledger: Its token ledger, equal to the one the run will write.
        num_trainings: 1, or the number of learning rates compared, or 0.
        is_tuning: Whether it only serves the choice of learning rate and epochs.
        batches: Steps, forward passes and padding of one training, equal to those of a run on this
            machine as long as memory suffices and packing is right for the model; None where
            nothing is trained. ``micro_batch_tokens: auto`` makes forward passes of a GPU larger
            than those of a CPU; ``device: cuda`` counts them where there is none.
    """

    cell: Cell
    ledger: dict[str, Any]
    num_trainings: int
    is_tuning: bool
    batches: BatchCounts | None

    def seconds(self, cost: Cost) -> float:
        """Estimate of its trainings and its evaluation."""
        training = self.num_trainings * cost.training_seconds(self.ledger)
        return training + (0.0 if self.is_tuning else cost.evaluation_seconds)


@dataclass(frozen=True)
class Plan:
    """An experiment before it runs.

    Attributes:
        cells: Every cell, tuning first. While epochs are still to be chosen, the ledgers of cells
            that are not tuning hold for the most epochs.
        cost: What tokens cost on this machine.
        disk_bytes: Estimate of what the run directory will hold: data, mixtures, weights.
        power: For each metric on test items, the smallest difference that can be shown.
        noise: Noise of the primary metric, where an earlier run of the directory measured it.
    """

    cells: tuple[CellPlan, ...]
    cost: Cost
    disk_bytes: int
    power: dict[str, dict[str, Any]]
    noise: Noise | None

    @property
    def rendered_tokens(self) -> int:
        """Tokens of all trainings, all epochs."""
        return sum(plan.ledger["rendered_tokens"] * plan.num_trainings for plan in self.cells)

    @property
    def training_seconds(self) -> float:
        """Estimate for all trainings, one after another."""
        cost = self.cost
        return sum(one.num_trainings * cost.training_seconds(one.ledger) for one in self.cells)

    @property
    def evaluation_seconds(self) -> float:
        """Estimate for all evaluations, one after another."""
        return self.cost.evaluation_seconds * sum(not one.is_tuning for one in self.cells)

    @property
    def wall_seconds(self) -> float:
        """Estimate for the whole run, trainings and evaluations side by side in the lanes."""
        return sum(plan.seconds(self.cost) for plan in self.cells) / self.cost.num_lanes


def make_plan(spec: ExperimentSpec, curated: Stage) -> Plan:
    """Draw every cell's budgets from the curated data and count; nothing is trained.

    Raises:
        InputError: A budget holds no example, an example exceeds the model's context, a
            reference does not fit a metric, or the model's code rules out packing that was asked
            for.
    """
    check_references_of(spec, curated)
    limits = planned_limits(skeleton(spec.model.id, spec.model.revision), spec.training)
    tuned = tuning_cells(spec)
    cells = [
        *(plan for cell in tuned for plan in _tuning_plans(spec, cell, curated, limits)),
        *(_plan(spec, cell, curated, limits) for cell in plan_cells(spec)),
    ]
    directory = resolve_model(spec.model.id, spec.model.revision)
    check_weights(directory)
    parameters = num_parameters(directory)
    return Plan(
        cells=tuple(cells),
        cost=estimate_cost(spec, curated, parameters),
        disk_bytes=_disk_bytes(spec, curated, cells, parameters),
        power=power_of(spec, curated),
        noise=measured_noise(curated.root, spec.analysis.primary_metric),
    )


def power_of(spec: ExperimentSpec, curated: Stage) -> dict[str, dict[str, Any]]:
    """By metric on test items: the smallest difference that seeds and items can show."""
    pool = open_pools(curated.path, renderer_of(spec)).corpus("task_test")
    num_items = min(spec.evaluation.max_items or pool.num_examples, pool.num_examples)
    confidence = spec.analysis.confidence
    return {
        metric.name: power_before_training(
            metric,
            num_items,
            len(spec.seeds),
            measured_noise(curated.root, metric.name),
            confidence=confidence,
        )
        for metric in build_metrics(spec.evaluation)
        if metric.items == "test"
    }


def measured_noise(root: Path, metric: str) -> Noise | None:
    """How far seeds and items scattered in an earlier run of this directory, or None.

    Root mean squares over its task budgets, so that they are about a typical one.
    """
    path = root / LEVERAGE_FILE
    entry = read_json(path)["metrics"].get(metric) if path.exists() else None
    rows = [row for row in _power_rows(entry) if row.get("seed_sd") is not None]
    if not rows:
        return None
    return Noise(*(_root_mean_square([row[name] for row in rows]) for name in Noise._fields))


def _power_rows(entry: dict[str, Any] | None) -> Sequence[dict[str, Any]]:
    return entry["power"]["by_task_budget"] if entry and entry["power"] else ()


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


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
            "forward passes": entry.batches.forward_passes if entry.batches else 0,
            "padding": round(entry.batches.padding_share, 4) if entry.batches else None,
            "trainings": entry.num_trainings,
        }
        for entry in plan.cells
    ]


def shortages(plan: Plan) -> list[str]:
    """A sentence for each task or general budget that is larger than the data it is drawn from."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for entry in plan.cells:
        for role in ("task", "general"):
            budget = entry.ledger[f"{role}_budget_tokens"]
            sources = [one for one in entry.ledger["sources"] if one["role"] == role]
            available = sum(one["available"] for one in sources)
            if sources and available < budget:
                num_examples = sum(one["num_examples"] for one in sources)
                found[role, budget] = (available, num_examples)
    return [
        f"a {role} budget of {budget:,} tokens is more than there is: all {num_examples:,} examples"
        f" with {available:,} tokens are used, none is repeated to fill it"
        for (role, budget), (available, num_examples) in sorted(found.items())
    ]


def _plan(spec: ExperimentSpec, cell: Cell, curated: Stage, limits: Limits) -> CellPlan:
    stage = gradients_for(spec, cell, curated)
    gradients = stage.path if stage else None
    renderer = renderer_of(spec)
    ledger = plan_cell(spec, cell, curated.path, renderer, context_of(spec), gradients)
    if not parse_arm(cell.arm).is_trained:
        return CellPlan(cell, ledger, num_trainings=0, is_tuning=False, batches=None)
    lengths, lay_out_order = plan_positions(spec, cell, curated.path, renderer, gradients)
    size, num_ranks = spec.training.batch_size, spec.training.num_ranks
    if needs_no_layout(lengths, size, limits, num_ranks):
        steps, tokens = ledger["steps"], ledger["rendered_tokens"]
        batches = BatchCounts(steps, steps, tokens, tokens)
    else:
        batches = count_batches(lengths, lay_out_order(), size, limits, num_ranks)
    return CellPlan(cell, ledger, num_trainings=1, is_tuning=False, batches=batches)


def _tuning_plans(
    spec: ExperimentSpec, cell: Cell, curated: Stage, limits: Limits
) -> Iterator[CellPlan]:
    """One plan for each number of epochs tried."""
    candidates = spec.training.candidates
    for epochs in sorted({settings.epochs for settings in candidates}):
        same = [settings for settings in candidates if settings.epochs == epochs]
        plan = _plan(settled(spec, same[0]), cell, curated, limits)
        yield replace(plan, num_trainings=len(same), is_tuning=True)


def _disk_bytes(
    spec: ExperimentSpec, curated: Stage, cells: Sequence[CellPlan], parameters: int
) -> int:
    """Data, mixtures and weights; logs and tables, some 100 kB a cell, are left out.

    Planning has rendered every look that the cells need, so the token stores are there to be
    measured. A mixture is an index over them.
    """
    stores = [curated.path, *curated.path.parent.glob("tokens-*")]
    data = sum(path.stat().st_size for store in stores for path in store.iterdir())
    mixtures = sum(plan.num_trainings and _index_bytes(plan.ledger) for plan in cells)
    share = 0.05 if spec.training.method == "lora" else 1.0
    num_kept = sum(plan.num_trainings * _num_kept(spec, plan) for plan in cells)
    return data + mixtures + num_kept * int(parameters * share) * 4


def _index_bytes(ledger: dict[str, Any]) -> int:
    """Size of a mixture's index: 8 bytes a row of a store, 4 a position of the order."""
    num_rows = ledger["num_task_examples"] + ledger["num_general_examples"]
    return int(8 * num_rows + 4 * ledger["epochs"] * num_rows)


def _num_kept(spec: ExperimentSpec, plan: CellPlan) -> int:
    """How often a training writes its weights: once, and at every probe where so wished."""
    if not spec.training.keep_probe_weights:
        return 1
    return 1 + min(spec.training.num_probes, int(plan.ledger["steps"]) + 1)
