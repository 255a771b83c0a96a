"""Cells: arms x task budgets x general budgets x seeds, axes an arm does not use left out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tell_core.spec.arms import Arm, parse_arm
from tell_core.spec.model import ExperimentSpec


@dataclass(frozen=True, order=True)
class Cell:
    """One arm at one task budget, one general budget, one seed.

    Attributes:
        arm: Name of the arm.
        task_budget_tokens: Upper bound on task tokens, or None when the arm uses no task data.
        general_budget_tokens: Upper bound on general tokens, or None likewise. `sft_matched`
            has one too: it takes its number of steps from `tell` at that general budget.
        seed: Seed of data choice, order and training.
    """

    arm: str
    task_budget_tokens: int | None
    general_budget_tokens: int | None
    seed: int

    @property
    def name(self) -> str:
        """File-safe name, unique within an experiment: ``tell-t8000-g20000-s0``."""
        parts = [self.arm.replace("(", "").replace(")", "")]
        if self.task_budget_tokens is not None:
            parts.append(f"t{self.task_budget_tokens}")
        if self.general_budget_tokens is not None:
            parts.append(f"g{self.general_budget_tokens}")
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def label(self) -> str:
        """For people: ``tell · 8k task · 20k general · seed 0``."""
        parts = [self.arm]
        if self.task_budget_tokens is not None:
            parts.append(f"{short_count(self.task_budget_tokens)} task")
        if self.general_budget_tokens is not None:
            parts.append(f"{short_count(self.general_budget_tokens)} general")
        return " · ".join([*parts, f"seed {self.seed}"])


def plan_cells(spec: ExperimentSpec) -> tuple[Cell, ...]:
    """Every cell of an experiment, in the order of arms, budgets and seeds given."""
    return tuple(cell for name in spec.arms for cell in _cells_of_arm(spec, parse_arm(name)))


def tuning_cells(spec: ExperimentSpec) -> tuple[Cell, ...]:
    """One cell per trained arm at the tuning budget and seed; empty when nothing is tuned."""
    if not spec.training.is_tuned:
        return ()
    budget = spec.tuning_budget_tokens
    arms = [parse_arm(name) for name in spec.arms]
    return tuple(
        Cell(
            arm=arm.name,
            task_budget_tokens=budget if arm.uses_task else None,
            general_budget_tokens=spec.budgets.general_tokens[-1] if _has_general(arm) else None,
            seed=spec.tuning.seed,
        )
        for arm in arms
        if arm.is_trained
    )


def short_count(count: int) -> str:
    """A count of tokens for people: 950, 8k, 2.5k, 1.2M."""
    for unit, suffix in ((1_000_000, "M"), (1_000, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return str(count)


def _cells_of_arm(spec: ExperimentSpec, arm: Arm) -> Iterator[Cell]:
    task_budgets = spec.budgets.task_tokens if arm.uses_task else (None,)
    general_budgets = spec.budgets.general_tokens if _has_general(arm) else (None,)
    seeds = spec.seeds if arm.is_trained or arm.has_shots else spec.seeds[:1]
    for task, general, seed in product(task_budgets, general_budgets, seeds):
        yield Cell(arm.name, task, general, seed)


def _has_general(arm: Arm) -> bool:
    return arm.uses_general or arm.matches_steps
