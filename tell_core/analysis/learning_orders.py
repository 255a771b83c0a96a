"""The Q sequence of a run: in which order each arm learns the units of the task."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import numpy as np

from tell_core.analysis.registration import Split, task_units
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.sequence import (
    LearningTimes,
    learning_order,
    learning_times,
    rank_agreement,
)
from tell_core.analysis.traces import read_trace


def learning_orders(run: RunCells, split: Split | None = None) -> dict[str, Any]:
    """The learning order of each arm with intervals over its seeds, and how far orders agree.

    Cells at the smallest task budget and the largest general budget; `general_only` has no task.

    Args:
        run: The cells.
        split: The registered split, where there is one.

    Returns:
        The content of sequence.json: names of the ``units`` and their ``groups`` (null without a
        split); by arm ``num_seeds``, ``last_step`` and ``order``, a row of `learning_order` for
        each unit; agreement of the seeds of an arm (``within_arm``) and of its seeds with those of
        `tell` (``with_tell``), null where it is not defined.
    """
    names, times, last_steps = _times_by_arm(run)
    confidence = run.resampling.confidence
    tell = times.get("tell", [])
    return {
        "confidence": confidence,
        "task_budget_tokens": run.task_budget,
        "general_budget_tokens": run.general_budget,
        "units": list(names),
        "groups": [split.groups.get(name) for name in names] if split else None,
        "within_arm": {arm: _agreement(found, found) for arm, found in times.items()},
        "with_tell": {
            arm: _agreement(found, tell) for arm, found in times.items() if arm != "tell"
        },
        "arms": {
            arm: {
                "num_seeds": len(found),
                "last_step": last_steps[arm],
                "order": learning_order(found, confidence),
            }
            for arm, found in times.items()
        },
    }


def _times_by_arm(
    run: RunCells,
) -> tuple[tuple[str, ...], dict[str, list[LearningTimes]], dict[str, int]]:
    """Names of the units; by arm their learning times, a training per seed, and its last step."""
    names: tuple[str, ...] = ()
    times: dict[str, list[LearningTimes]] = {}
    last_steps: dict[str, int] = {}
    for cell in run.cells:
        at_task = cell.task_budget_tokens == run.task_budget
        at_general = cell.general_budget_tokens in (None, run.general_budget)
        trace = read_trace(cell) if at_task and at_general else None
        if trace is not None:
            units = task_units(trace)
            names = units.names
            times.setdefault(cell.arm, []).append(learning_times(units.steps, units.losses))
            last_steps[cell.arm] = max(last_steps.get(cell.arm, 0), int(units.steps[-1]))
    return names, times, last_steps


def _agreement(
    first: Sequence[LearningTimes], second: Sequence[LearningTimes]
) -> dict[str, float | int] | None:
    """Agreement over all pairs of different trainings, each pair once: mean, least and greatest."""
    pairs = combinations(first, 2) if first is second else product(first, second)
    found = [agreement for a, b in pairs if (agreement := rank_agreement(a, b)) is not None]
    if not found:
        return None
    kendalls = [one.kendall for one in found]
    return {
        "kendall": float(np.mean(kendalls)),
        "kendall_low": min(kendalls),
        "kendall_high": max(kendalls),
        "spearman": float(np.mean([one.spearman for one in found])),
        "num_pairs": len(found),
        "num_units": min(one.num_units for one in found),
    }
