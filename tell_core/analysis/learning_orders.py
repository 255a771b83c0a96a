"""The Q sequence of a run: in which order each arm learns the units of the task."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np

from tell_core.analysis.registration import Split, Units, task_units
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.sequence import (
    LEARNED_SHARE,
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
        split); by arm ``num_seeds``, ``last_step``, ``lost_share`` and ``order``, a row of
        `learning_order` for each unit; agreement of the seeds of an arm (``within_arm``) and of
        its seeds with those of `tell` (``with_tell``), null where it is not defined. A unit is
        learned when its loss first is at most half of that before training; ``lost_share`` of
        those learned are above it at the last probe.
    """
    names, times, lasts = _times_by_arm(run)
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
                "last_step": max(one.step for one in lasts[arm]),
                "lost_share": float(np.mean([one.lost_share for one in lasts[arm]])),
                "order": learning_order(found, confidence),
            }
            for arm, found in times.items()
        },
    }


class _Last(NamedTuple):
    """The last probe of a training: its step, and the share of the units learned then lost."""

    step: int
    lost_share: float

    @classmethod
    def of(cls, units: Units, times: LearningTimes) -> "_Last":
        is_learned = times.is_learned & ~times.was_known
        is_lost = units.losses[-1] > LEARNED_SHARE * units.losses[0]
        return cls(
            int(units.steps[-1]), float((is_lost & is_learned).sum() / max(1, is_learned.sum()))
        )


def _times_by_arm(
    run: RunCells,
) -> tuple[tuple[str, ...], dict[str, list[LearningTimes]], dict[str, list[_Last]]]:
    """Names of the units; by arm their learning times and last probes, a training per seed."""
    names: tuple[str, ...] = ()
    times: dict[str, list[LearningTimes]] = {}
    lasts: dict[str, list[_Last]] = {}
    for cell in run.cells:
        has_task = cell.task_budget_tokens is not None
        trace = read_trace(cell) if has_task and run.is_chosen(cell) else None
        if trace is not None:
            units = task_units(trace)
            names = units.names
            times.setdefault(cell.arm, []).append(learning_times(units.steps, units.losses))
            lasts.setdefault(cell.arm, []).append(_Last.of(units, times[cell.arm][-1]))
    return names, times, lasts


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
