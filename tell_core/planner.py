"""What of an experiment fits into so many hours.

The specification is the most that is wanted. Parts are left out, one after another, in the order
of how little the answer loses by them, until the rest fits: arms beyond the comparison of TELL with
SFT, seeds beyond three, smaller general budgets, task budgets between close neighbours, and at last
the third seed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tell_core.analysis.power import Noise, half_width
from tell_core.plan import Plan
from tell_core.spec.cells import Cell, short_count
from tell_core.spec.model import ExperimentSpec

CORE_ARMS = ("base", "base_few_shot", "sft", "sft_matched", "tell")
_FEWEST_BUDGETS = 3
_SEEDS_ALONE = Noise(seed_sd=1.0, item_difference_sd=0.0)


@dataclass(frozen=True)
class Design:
    """A part of an experiment.

    Attributes:
        spec: The specification of the part.
        left_out: What of the whole it leaves out, in the order of leaving out.
        hours: Estimate of its wall time on this machine.
        num_cells: Its cells.
        half_width: Half the expected interval of a difference between two arms on the primary
            metric, in its units where the plan knows its noise; else in standard deviations over
            seeds, items left out. None with one seed or item, which give no interval.
    """

    spec: ExperimentSpec
    left_out: tuple[str, ...]
    hours: float
    num_cells: int
    half_width: float | None

    @property
    def settings(self) -> tuple[str, ...]:
        """``--set`` arguments that run this part instead of the whole."""
        budgets = self.spec.budgets
        return (
            f"arms=[{', '.join(self.spec.arms)}]",
            f"seeds={list(self.spec.seeds)}",
            f"budgets.task_tokens={list(budgets.task_tokens)}",
            *([f"budgets.general_tokens={list(budgets.general_tokens)}"] * bool(self.spec.general)),
            *(
                [f"tuning.task_tokens={self.spec.tuning.task_tokens}"]
                if self.spec.training.is_tuned
                else []
            ),
        )


def designs(spec: ExperimentSpec, plan: Plan) -> list[Design]:
    """The whole experiment, then ever smaller parts of it.

    Args:
        spec: The experiment.
        plan: Its plan; every part's cells are among those of the whole, tuning at the same budget.
    """
    if spec.training.is_tuned:  # a default tuning budget would move with the budgets left out
        tuning = spec.tuning.model_copy(update={"task_tokens": spec.tuning_budget_tokens})
        spec = spec.model_copy(update={"tuning": tuning})
    found = [_design(spec, (), plan)]
    for part, left_out in _smaller(spec):
        found.append(_design(part, (*found[-1].left_out, left_out), plan))
    return found


def _design(spec: ExperimentSpec, left_out: tuple[str, ...], plan: Plan) -> Design:
    entries = [entry for entry in plan.cells if _is_within(entry.cell, spec, entry.is_tuning)]
    seconds = sum(entry.seconds(plan.cost) for entry in entries) / plan.cost.num_lanes
    return Design(
        spec=spec,
        left_out=left_out,
        hours=seconds / 3600,
        num_cells=sum(not entry.is_tuning for entry in entries),
        half_width=half_width(
            plan.noise or _SEEDS_ALONE,
            len(spec.seeds),
            plan.power[spec.analysis.primary_metric]["num_items"],
            spec.analysis.confidence,
        ),
    )


def _is_within(cell: Cell, spec: ExperimentSpec, is_tuning: bool) -> bool:
    budgets = spec.budgets
    if cell.arm not in spec.arms:
        return False
    if is_tuning:
        return True
    return (
        cell.seed in spec.seeds
        and cell.task_budget_tokens in (None, *budgets.task_tokens)
        and cell.general_budget_tokens in (None, *budgets.general_tokens)
    )


def _smaller(spec: ExperimentSpec) -> Iterator[tuple[ExperimentSpec, str]]:
    """Ever smaller parts, each with what it leaves out of the one before."""
    extra = [arm for arm in spec.arms if arm not in CORE_ARMS]
    for arm in sorted(extra, key=lambda arm: arm == "general_only"):
        spec = spec.model_copy(update={"arms": tuple(a for a in spec.arms if a != arm)})
        yield spec, f"arm {arm}"
    while len(spec.seeds) > 3:
        spec, seed = _without_last_seed(spec)
        yield spec, f"seed {seed}"
    while len(spec.budgets.general_tokens) > 1:
        first, *rest = spec.budgets.general_tokens
        spec = _with_budgets(spec, general_tokens=tuple(rest))
        yield spec, f"general budget {short_count(first)}"
    while len(spec.budgets.task_tokens) > _FEWEST_BUDGETS:
        budget = _most_crowded(spec.budgets.task_tokens)
        kept = tuple(b for b in spec.budgets.task_tokens if b != budget)
        spec = _with_budgets(spec, task_tokens=kept)
        yield spec, f"task budget {short_count(budget)}"
    if len(spec.seeds) == 3:
        spec, seed = _without_last_seed(spec)
        yield spec, f"seed {seed}"


def _most_crowded(budgets: tuple[int, ...]) -> int:
    """The inner budget whose neighbours are closest together, on a log scale."""
    inner = range(1, len(budgets) - 1)
    return budgets[min(inner, key=lambda at: math.log(budgets[at + 1] / budgets[at - 1]))]


def _without_last_seed(spec: ExperimentSpec) -> tuple[ExperimentSpec, int]:
    *kept, last = spec.seeds
    return spec.model_copy(update={"seeds": tuple(kept)}), last


def _with_budgets(spec: ExperimentSpec, **values: tuple[int, ...]) -> ExperimentSpec:
    return spec.model_copy(update={"budgets": spec.budgets.model_copy(update=values)})
