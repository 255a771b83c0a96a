"""P1: the loss of single items over the amount of general data, and whether it falls in a step.

Shape letters: N items, G general budgets, S seeds, P = G S trainings, D draws.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tell_core.analysis.cells import read_lines
from tell_core.analysis.emergence import (
    MIN_GUARD_SHARE,
    MIN_POINTS,
    ItemVerdict,
    shape_verdicts,
)
from tell_core.analysis.resampling import FloatArray, Resampling, item_weights, seed_deviations
from tell_core.analysis.run_cells import MIN_SEEDS, RunCells, component_of
from tell_core.analysis.sequence import BoolArray, IntArray
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured
from tell_core.evaluation.base import PREDICTIONS_FILE

# Draws of smooth curves. With the first number alone no p is below 0.02, which Holm's correction
# over seven predictions makes 0.14; the second is drawn where the first leaves that open.
_NUM_DRAWS, _NUM_ALL_DRAWS = 99, 399
_MANY_AS_GOOD = 10


class ItemCurves(NamedTuple):
    """Losses of test items over the general budget, all seeds side by side.

    Attributes:
        scale: Shape (P,). Log general tokens, never falling.
        seeds: Shape (P,). Seed of each training.
        losses: Shape (P, N). Nats per token.
        items: N names.
    """

    scale: FloatArray
    seeds: IntArray
    losses: FloatArray
    items: tuple[str, ...]

    def select(self, trainings: BoolArray) -> "ItemCurves":
        """The curves through some of the trainings."""
        return ItemCurves(
            self.scale[trainings], self.seeds[trainings], self.losses[trainings], self.items
        )


def emergence_with_data(run: RunCells) -> Finding:
    """P1: shapes of the items' loss over the logarithm of the general budget.

    The first component is the share of items with a step beyond the control of equal steps
    (`step_excess`). The second asks whether as many steps would show if every item fell along its
    best smooth curve, with the residuals that it has.
    """
    tell, matched = (_item_curves(run, arm) for arm in ("tell", "sft_matched"))
    if tell is None:
        return unmeasured("P1", "trained cells of arm tell")
    if (needs := _needs(tell)) is not None:
        return unmeasured("P1", needs)
    if matched is None or not _is_paired(tell, matched):
        return unmeasured("P1", "arm sft_matched at the same budgets: the control of equal steps")
    verdicts = shape_verdicts(tell.scale, tell.losses)
    parts = (
        step_excess(tell, matched, run.resampling),
        step_surplus(tell, verdicts, run.resampling.confidence),
    )
    return Finding(
        "P1",
        CLAIMS["P1"],
        parts,
        remark=_remark(verdicts, shape_verdicts(matched.scale, matched.losses)),
        figure=_figure(tell, verdicts),
    )


def step_excess(tell: ItemCurves, matched: ItemCurves, resampling: Resampling) -> Component:
    """Share of items whose fall is a step that passes the guard, beyond that of a control.

    One seed has too few points to show a step, so that there is no share of each seed whose spread
    could be taken. What a seed contributes is found by leaving it out: the jackknife's
    pseudo-values stand for the seeds and are drawn from Student's t, as everywhere, beside items
    drawn with replacement.

    Args:
        tell: Curves of the arm with general data.
        matched: The same items, scales and seeds under the control of equal steps.
        resampling: How the interval is drawn.
    """
    difference = _is_step(tell) - _is_step(matched)
    seeds = np.unique(tell.seeds)
    without = [
        float((_is_step(tell.select(kept)) - _is_step(matched.select(kept))).mean())
        for kept in (tell.seeds != seed for seed in seeds)
    ]
    pseudo_values = -(len(seeds) - 1) * np.array(without)  # up to a constant, which draws ignore
    estimate = float(difference.mean())
    by_items = item_weights(len(difference), resampling) @ difference / len(difference)
    draws = by_items + seed_deviations(len(seeds), resampling) @ pseudo_values
    return component_of(
        "share of items with a step, beyond the control of equal steps",
        np.concatenate([[estimate], draws]),
        resampling.confidence,
    )


def _is_step(curves: ItemCurves) -> FloatArray:
    """Shape (N,): 1 where an item's fall is a step that passes the guard."""
    verdicts = shape_verdicts(curves.scale, curves.losses)
    return np.array([one.is_emergent for one in verdicts], dtype=np.float64)


def _item_curves(run: RunCells, arm: str) -> ItemCurves | None:
    cells = run.of(arm, task_budget_tokens=run.task_budget)
    cells = sorted(cells, key=lambda cell: (cell.general_budget_tokens or 0, cell.seed))
    if not cells:
        return None
    tables = [read_lines(cell.evaluated / PREDICTIONS_FILE) for cell in cells]
    return ItemCurves(
        scale=np.log([float(cell.general_budget_tokens or 1) for cell in cells]),
        seeds=np.array([cell.seed for cell in cells], dtype=np.int64),
        losses=np.array([[row["nll"] / row["num_tokens"] for row in table] for table in tables]),
        items=tuple(row["item_id"] for row in tables[0]),
    )


def _needs(tell: ItemCurves) -> str | None:
    num_budgets, num_seeds = len(np.unique(tell.scale)), len(np.unique(tell.seeds))
    if num_budgets < MIN_POINTS:
        return f"at least {MIN_POINTS} general budgets for tell; this run has {num_budgets}"
    if num_seeds < MIN_SEEDS:
        return f"at least {MIN_SEEDS} seeds; this run has {num_seeds}"
    return None


def _is_paired(tell: ItemCurves, matched: ItemCurves) -> bool:
    return np.array_equal(tell.scale, matched.scale) and np.array_equal(tell.seeds, matched.seeds)


def _step_share(verdicts: Sequence[ItemVerdict]) -> float:
    return float(np.mean([one.verdict == "step" for one in verdicts]))


def step_surplus(
    curves: ItemCurves, verdicts: Sequence[ItemVerdict], confidence: float
) -> Component:
    """The share of steps against what smooth falls with these residuals would show.

    Args:
        curves: Of the arm with general data.
        verdicts: Shapes of its items.
        confidence: Coverage of the interval.
    """
    draws = _smooth_shares(curves)
    shares = np.array(list(islice(draws, _NUM_DRAWS)))
    observed = _step_share(verdicts)
    if (shares >= observed).sum() < _MANY_AS_GOOD:
        shares = np.concatenate([shares, list(islice(draws, _NUM_ALL_DRAWS - _NUM_DRAWS))])
    excess = observed - shares
    p_value = (1 + int((excess <= 0).sum())) / (1 + len(shares))
    low, high = np.quantile(excess, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Component(
        "share of steps, beyond smooth curves with the same noise",
        float(excess.mean()),
        float(low),
        float(high),
        min(1.0, 2 * p_value),
        bool(excess.mean() > 0),
    )


def _smooth_shares(curves: ItemCurves) -> Iterator[float]:
    """Without end, shares of steps where every item falls smoothly.

    The smooth curve of an item is a parabola in the log scale. The noise is that of the seeds
    around their mean, drawn by training, the same for all items, so that what the items of one
    training have in common stays common.
    """
    scale, losses = curves.scale, curves.losses
    levels, place = np.unique(scale, return_inverse=True)
    design = np.stack([np.ones_like(scale), scale, scale**2], axis=1)
    fitted = design @ np.linalg.lstsq(design, losses, rcond=None)[0]
    means = np.stack([losses[place == k].mean(axis=0) for k in range(len(levels))])
    num_seeds = len(scale) / len(levels)
    residuals = (losses - means[place]) * np.sqrt(num_seeds / (num_seeds - 1))
    generator = np.random.default_rng(0)
    while True:
        drawn = residuals[generator.integers(len(scale), size=len(scale))]
        yield _step_share(shape_verdicts(scale, fitted + drawn, is_guarded=False))


def _remark(verdicts: Sequence[ItemVerdict], control: Sequence[ItemVerdict]) -> str:
    counts = Counter(one.verdict for one in verdicts)
    steps, with_steps_alone = (
        sum(one.is_emergent for one in group) for group in (verdicts, control)
    )
    return (
        f"{steps} of {len(verdicts)} items step with general data (in at least"
        f" {MIN_GUARD_SHARE:.0%} of the draws), {with_steps_alone} with steps alone; shapes: "
        + ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())
        + "."
    )


def _figure(curves: ItemCurves, verdicts: Sequence[ItemVerdict]) -> dict[str, Any]:
    return {
        "general_tokens": np.exp(curves.scale).round().tolist(),
        "items": [
            {
                "item": item,
                "verdict": one.verdict,
                "guard_share": one.guard_share,
                "losses": losses.tolist(),
            }
            for item, one, losses in zip(curves.items, verdicts, curves.losses.T, strict=True)
        ],
    }
