"""P2: shared units are learned before specific ones, and general data moves the shared ones."""

from collections import Counter
from typing import Any

import numpy as np

from tell_core.analysis.registration import Split, task_units
from tell_core.analysis.resampling import FloatArray, Resampling
from tell_core.analysis.run_cells import MIN_GROUP_UNITS, RunCells, needs_seeds, traced
from tell_core.analysis.sequence import (
    BoolArray,
    LearningTimes,
    learning_times,
    log_rank,
    strata_of,
    survival_curve,
)
from tell_core.analysis.time_regression import Observations, coefficient, joined
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured
from tell_core.errors import AnalysisError


def shared_before_specific(run: RunCells, split: Split) -> Finding:
    """P2: learning times of shared and specific units of the task under TELL.

    Log-rank test stratified by base loss over all general budgets, and the interaction of group
    and general budget in a censored regression of log time. Units are tokens where they were
    traced; whole items are drawn, and seeds from Student's t. The log-rank test knows these
    trainings alone, so the first p-value is the larger of its own and that of the regression.
    """
    found = observations_of(run, split)
    if isinstance(found, str):
        return unmeasured("P2", found)
    observed, is_shared, log_general = found
    times = observed.times
    test = log_rank(times, is_shared, strata_of(times.base_losses), observed.clusters)
    needs = None
    try:
        ratio = group_effect(observed, is_shared, log_general, run.resampling)
        components = [ratio._replace(p_value=max(test.p_value, ratio.p_value))]
        if len(np.unique(log_general)) < 3:
            needs = "at least 3 general budgets for its second half: what more general data moves"
        else:
            components.append(_interaction(observed, is_shared, log_general, run.resampling))
    except AnalysisError as error:
        return unmeasured("P2", str(error))
    remark = (
        f"Log-rank z = {test.z:.1f}; {int(is_shared.sum())} observations of shared and"
        f" {int((~is_shared).sum())} of specific units, split registered as {split.digest}."
        f" {_for_good(run, split)}"
    )
    figure = {
        "survival": _survival(times, is_shared, log_general == log_general.max()),
        "groups": split.counts(),
    }
    return Finding("P2", CLAIMS["P2"], tuple(components), needs, remark, figure)


def _for_good(run: RunCells, split: Split) -> str:
    """The first part by another definition of learned, in words; it is no part of the verdict."""
    found = observations_of(run, split, is_for_good=True)
    assert not isinstance(found, str), "the same units as by the first fall"
    try:
        part = group_effect(*found, run.resampling)
    except AnalysisError as error:
        return f"By the step from which losses stay at most half: {error}."
    low, high = (end if end is not None else float("nan") for end in (part.low, part.high))
    return (
        "Learned is the first fall to half. By the step from which on losses stay there, the first"
        f" part is {part.estimate:.2f} ({low:.2f} to {high:.2f}), p = {part.p_value:.2g}."
    )


def _survival(
    times: LearningTimes, is_shared: BoolArray, is_last: BoolArray
) -> dict[str, dict[str, list[float]]]:
    """Kaplan-Meier curves of either group at the largest general budget."""
    groups = (("shared", is_shared), ("specific", ~is_shared))
    return {name: survival_curve(times.select(is_last & chosen)) for name, chosen in groups}


def observations_of(
    run: RunCells, split: Split, *, is_for_good: bool = False
) -> tuple[Observations, BoolArray, FloatArray] | str:
    """Times of all shared and specific units in all TELL cells, or what is missing for that.

    With it whether each is shared, and its log general tokens. ``is_for_good``: see
    `learning_times`.
    """
    parts: list[tuple[LearningTimes, Any, Any, FloatArray]] = []
    cells = traced(run.of("tell", task_budget_tokens=run.task_budget))
    if (needs := needs_seeds(cells)) is not None:
        return needs
    for cell, trace in cells:
        units = task_units(trace)
        groups = split.of(units.names)
        chosen = (groups == "shared") | (groups == "specific")
        times = learning_times(units.steps, units.losses, is_for_good=is_for_good)
        times = times.select(chosen)
        log_general = np.full(int(chosen.sum()), np.log(cell.general_budget_tokens or 1))
        parts.append((times, groups[chosen] == "shared", units.items[chosen], log_general))
    counts = Counter(parts[0][1].tolist())
    if min(counts[True], counts[False]) < MIN_GROUP_UNITS:
        return (
            f"at least {MIN_GROUP_UNITS} shared and {MIN_GROUP_UNITS} specific units of the task;"
            f" the registered split has {counts[True]} and {counts[False]}"
        )
    times = joined([part[0] for part in parts])
    shared, items, log_general = (
        np.concatenate([part[place] for part in parts]) for place in (1, 2, 3)
    )
    seeds = np.repeat([cell.seed for cell, _ in cells], [len(part[1]) for part in parts])
    return Observations(times, items, seeds), shared, log_general


def group_effect(
    observed: Observations, is_shared: BoolArray, log_general: FloatArray, resampling: Resampling
) -> Component:
    """Log of the time of specific units over that of shared ones, at equal base loss.

    Args:
        observed: U observations; items are drawn together.
        is_shared: Shape (U,).
        log_general: Shape (U,). Log general tokens of the training.
        resampling: How the interval is drawn.

    Raises:
        AnalysisError: A seed does not determine the effect.
    """
    columns = [np.ones(len(is_shared)), ~is_shared, np.log(observed.times.base_losses)]
    if np.ptp(log_general) > 0:  # a single general budget is the intercept once more
        columns.append(log_general)
    design = np.stack(columns, axis=1).astype(np.float64)
    name = "log learning time of specific minus shared units"
    return coefficient(name, observed, design, 1, resampling)


def _interaction(
    observed: Observations, is_shared: BoolArray, log_general: FloatArray, resampling: Resampling
) -> Component:
    """By how much more the shared units' log time falls per unit of log general data."""
    centred = log_general - log_general.mean()
    log_base = np.log(observed.times.base_losses)
    columns = [np.ones(len(centred)), ~is_shared, log_base, centred, ~is_shared * centred]
    design = np.stack(columns, axis=1).astype(np.float64)
    name = "change of log time with log general data, specific minus shared"
    return coefficient(name, observed, design, 4, resampling)
