"""P7: which group's losses a training moves its weights down, shared units' or specific units'.

Between two probes the weights move by a vector m. A group's loss is the mean over its units, g its
gradient at the first of the two probes. The cosine of m and -g is 1 where the training goes
straight down the group's loss and 0 where it moves across it. It is averaged over the intervals
between probes, which are logarithmically spaced, at which both groups still have something to
learn.

The null is that groups are exchangeable: the units' groups are exchanged many times and all is
computed again. Both groups have as many units, for a cosine with a mean over more of them is larger
by itself.

Shape letters: U units, K intervals, S seeds, D draws, P permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tell_core.analysis.kept_weights import (
    Groups,
    Progress,
    cells_with_weights,
    choose_groups,
    movement_of,
)
from tell_core.analysis.multiple import two_sided_p_value
from tell_core.analysis.registration import Split
from tell_core.analysis.resampling import FloatArray, Resampling, interval, seed_deviations
from tell_core.analysis.run_cells import MIN_GROUP_UNITS, RunCells
from tell_core.analysis.sequence import BoolArray, cluster_weights
from tell_core.analysis.traces import read_trace
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured
from tell_core.errors import AnalysisError

if TYPE_CHECKING:
    from tell_core.analysis.quanta.movement import Movement

FLOOR_NATS = 1e-3
"""Mean loss of a group below which its gradient in float32 is rounding noise, as in QDG."""
NUM_PERMUTATIONS = 999


class Draws(NamedTuple):
    """Weights of the units of either group.

    Attributes:
        observed: Shape (D + 1, U). How often each unit counts: once, then in draws of items.
        exchanged: Shape (P, U). Whether a unit is called shared.
    """

    observed: FloatArray
    exchanged: BoolArray


def specific_directions(
    run: RunCells, split: Split, root: Path, on_progress: Progress | None = None
) -> Finding:
    """P7: cosines of the movement with the descent of either group, under TELL and under SFT.

    Cells at the smallest task budget and the largest general budget; SFT is `sft_matched`, the
    control of equal steps, where the run has it. All three parts must be above 0: how much more
    TELL moves down specific than shared losses, beyond the same under SFT; the first of the two by
    itself; and how far SFT moves down the shared losses.

    Args:
        run: The cells.
        split: The registered split.
        root: The run directory; what is measured of a cell is kept there as a stage.
        on_progress: Called with a cell's name, intervals done and their number.
    """
    chosen = cells_with_weights(run, split)
    if isinstance(chosen, str):
        return unmeasured("P7", chosen)
    trace = read_trace(chosen["tell"][0])
    assert trace is not None, "weights are kept by trained cells"
    groups = choose_groups(trace, split)
    if len(groups.items) < 2 * MIN_GROUP_UNITS:
        counts = split.counts()
        return unmeasured(
            "P7",
            f"at least {MIN_GROUP_UNITS} shared and {MIN_GROUP_UNITS} specific units of the task;"
            f" the registered split has {counts['shared']} and {counts['specific']}",
        )
    movements = {
        arm: [movement_of(run.spec, cell, groups, root, on_progress) for cell in cells]
        for arm, cells in chosen.items()
    }
    return judge_movements(movements, groups, run.resampling)


def judge_movements(
    movements: dict[str, list[Movement]], groups: Groups, resampling: Resampling
) -> Finding:
    """The finding from what was measured.

    Args:
        movements: By arm, `tell` first and then an arm of SFT: one per seed, seeds paired.
        groups: The units that were looked at.
        resampling: How intervals are drawn.
    """
    tell, sft = movements
    draws = Draws(
        cluster_weights(groups.items, resampling.num_draws, resampling.seed),
        exchanged_groups(groups.is_shared, groups.items, NUM_PERMUTATIONS, resampling.seed),
    )
    try:
        found = {arm: _Cosines.of(ones, groups, draws) for arm, ones in movements.items()}
    except AnalysisError as error:
        return unmeasured("P7", str(error))
    more = "cosine of movement and descent, specific minus shared units"
    parts = (
        _compared(f"{more}: {tell} minus {sft}", found[tell].minus(found[sft]), resampling),
        _compared(f"{more}: {tell}", found[tell].contrast, resampling),
        _drawn(
            f"cosine of movement and descent of shared units: {sft}",
            found[sft].mean(found[sft].shared),
            resampling,
        ),
    )
    return Finding(
        "P7",
        CLAIMS["P7"],
        parts,
        remark=_remark(found, groups, tell, sft),
        figure={
            "directions": [
                row
                for arm, ones in movements.items()
                for row in _interval_rows(arm, ones, found[arm], resampling)
            ]
        },
    )


def exchanged_groups(
    is_shared: BoolArray, items: npt.NDArray[np.int64], num_draws: int, seed: int
) -> BoolArray:
    """Calls units shared or specific at random, keeping what items have in common.

    Within an item that holds units of both groups these are exchanged; items that hold one group
    alone exchange it as a whole, among themselves.

    Args:
        is_shared: Shape (U,).
        items: Shape (U,). Item of each unit.
        num_draws: P.
        seed: Seed of the draws.

    Returns:
        Shape (P, U).
    """
    generator = np.random.default_rng(seed)
    _, place = np.unique(items, return_inverse=True)
    share = np.bincount(place, is_shared) / np.bincount(place)
    is_mixed = (share > 0) & (share < 1)
    by_item = np.argsort(place, kind="stable")
    exchanged = np.empty((num_draws, len(items)), dtype=np.bool_)
    for row in exchanged:
        within = np.lexsort((generator.random(len(items)), place))
        row[within] = is_shared[by_item]
        of_item = share > 0
        of_item[~is_mixed] = generator.permutation(of_item[~is_mixed])
        row[~is_mixed[place]] = of_item[place][~is_mixed[place]]
    return exchanged


def group_cosines(movement: Movement, weights: FloatArray) -> FloatArray:
    """Cosine of each interval's movement with the descent of a group's mean loss.

    Args:
        movement: What was measured of a training.
        weights: Shape (D, U), not negative: 0 outside the group; only their ratios matter.

    Returns:
        Shape (D, K); NaN where the group is empty or its gradient vanishes.
    """
    falls = weights @ movement.along.T
    squares = np.stack([((weights @ gram) * weights).sum(axis=1) for gram in movement.gram], axis=1)
    is_defined = squares > 0
    return np.where(is_defined, falls / np.sqrt(np.where(is_defined, squares, 1.0)), np.nan)


class _Contrast(NamedTuple):
    """A statistic of several trainings, seed by seed.

    Attributes:
        observed: Shape (S, D + 1). As observed, then in draws of items.
        exchanged: Shape (S, P). With exchanged groups.
    """

    observed: FloatArray
    exchanged: FloatArray


class _Cosines(NamedTuple):
    """Cosines of one arm's trainings, interval by interval.

    Attributes:
        shared: Shape (S, D + 1, K).
        specific: Shape (S, D + 1, K).
        exchanged: Shape (S, P, K). Specific minus shared with exchanged groups.
        is_open: Shape (S, K). Whether both groups have something to learn.
    """

    shared: FloatArray
    specific: FloatArray
    exchanged: FloatArray
    is_open: BoolArray

    @classmethod
    def of(cls, movements: Sequence[Movement], groups: Groups, draws: Draws) -> _Cosines:
        """Compute them.

        Raises:
            AnalysisError: Trainings have different numbers of probes, or nothing left to learn.
        """
        if len({len(one.steps) for one in movements}) > 1:
            raise AnalysisError(
                "the same number of probes in every seed: raise `training.min_steps` or lower"
                " `training.num_probes`"
            )
        is_shared = groups.is_shared
        is_open = np.stack(
            [
                np.minimum(one.losses[:, is_shared].mean(1), one.losses[:, ~is_shared].mean(1))
                >= FLOOR_NATS
                for one in movements
            ]
        )
        if not is_open.any(axis=1).all():
            raise AnalysisError(
                f"a group with a mean loss of at least {FLOOR_NATS:g} nats at some probe: both"
                " groups were known before training"
            )
        sides = (is_shared, ~is_shared)
        shared, specific = (
            np.stack([group_cosines(one, draws.observed * side) for one in movements])
            for side in sides
        )
        called = (draws.exchanged.astype(np.float64), (~draws.exchanged).astype(np.float64))
        exchanged = np.stack(
            [group_cosines(one, called[1]) - group_cosines(one, called[0]) for one in movements]
        )
        return cls(shared, specific, exchanged, is_open)

    @property
    def contrast(self) -> _Contrast:
        """Specific minus shared, mean over the open intervals."""
        return _Contrast(self.mean(self.specific - self.shared), self.mean(self.exchanged))

    def minus(self, other: _Cosines) -> _Contrast:
        """The same beyond another arm's, seed by seed."""
        mine, others = self.contrast, other.contrast
        return _Contrast(mine.observed - others.observed, mine.exchanged - others.exchanged)

    def mean(self, cosines: FloatArray) -> FloatArray:
        """Mean over the open intervals: (S, D, K) -> (S, D)."""
        return np.stack(
            [one[:, chosen].mean(axis=1) for one, chosen in zip(cosines, self.is_open, strict=True)]
        )


def _compared(name: str, contrast: _Contrast, resampling: Resampling) -> Component:
    """A difference between groups.

    Its p-value is the larger of two: that of exchanged groups, which knows these trainings alone,
    and that of draws of items and seeds.
    """
    part = _drawn(name, contrast.observed, resampling)
    null = np.abs(contrast.exchanged.mean(axis=0))
    num_as_far = int((null >= abs(part.estimate) - 1e-12).sum())
    return part._replace(p_value=max(part.p_value, (1 + num_as_far) / (1 + len(null))))


def _drawn(name: str, rows: FloatArray, resampling: Resampling) -> Component:
    """Mean over seeds; items are drawn, and seeds from Student's t, as everywhere.

    Args:
        name: What is measured.
        rows: Shape (S, D + 1).
        resampling: How intervals are drawn.
    """
    estimate = float(rows[:, 0].mean())
    by_items = rows[:, 1:].mean(axis=0)
    deviations = by_items - np.nanmean(by_items)  # a draw without one of the groups says nothing
    deviations = deviations + seed_deviations(len(rows), resampling) @ rows[:, 0]
    draws = estimate + deviations[np.isfinite(deviations)]
    low, high = interval(draws, draws, resampling.confidence)
    return Component(name, estimate, low, high, two_sided_p_value(draws, draws), estimate > 0)


def _interval_rows(
    arm: str, movements: Sequence[Movement], cosines: _Cosines, resampling: Resampling
) -> list[dict[str, Any]]:
    """Interval by interval what an arm's cosines are, for the report; p-values uncorrected."""
    rows = []
    for place in range(cosines.is_open.shape[1]):
        if not cosines.is_open[:, place].all():
            continue
        here = _Contrast(
            (cosines.specific - cosines.shared)[:, :, place], cosines.exchanged[:, :, place]
        )
        part = _compared("specific minus shared", here, resampling)
        steps = np.array([one.steps[place : place + 2] for one in movements], dtype=np.float64)
        rows.append(
            {
                "arm": arm,
                "from_step": float(steps[:, 0].mean()),
                "to_step": float(steps[:, 1].mean()),
                "shared": float(cosines.shared[:, 0, place].mean()),
                "specific": float(cosines.specific[:, 0, place].mean()),
                "difference": part.estimate,
                "low": part.low,
                "high": part.high,
                "p_value": part.p_value,
            }
        )
    return rows


def _remark(found: dict[str, _Cosines], groups: Groups, tell: str, sft: str) -> str:
    means = {
        arm: [float(one.mean(side)[:, 0].mean()) for side in (one.shared, one.specific)]
        for arm, one in found.items()
    }
    num_seeds, num_intervals = found[tell].is_open.shape
    return (
        f"Mean cosines with the descent of shared and specific units: {means[tell][0]:.3f} and"
        f" {means[tell][1]:.3f} under {tell}, {means[sft][0]:.3f} and {means[sft][1]:.3f} under"
        f" {sft}; {int(groups.is_shared.sum())} units of each group, {num_seeds} seeds, at most"
        f" {num_intervals} intervals. The movement is that of the whole training: under TELL"
        " general data moves the weights too."
    )
