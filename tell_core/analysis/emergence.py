"""Emergence item by item: does a loss curve fall in one step, gradually, or not at all?

Four shapes are fitted to the loss of each item against t = log(step + 1), and compared by AICc
with the noise counted as a parameter:

- flat: a constant (2 parameters);
- gradual: a line in t (3), or a power law with offset, ``a + b exp(-c t)`` (4);
- step: a sigmoid in t (5) with its middle between the second and the last but one point, and its
  10-90 % fall within 40 % of the range of t. A wider sigmoid is a gradual curve by another name:
  power laws and lines are limits of it.

The best of each class competes; gradual and step must fall. A fourth class, "rising", takes lines,
power laws and sigmoids that go up. The verdict is the class with the lowest AICc if it leads by at
least 4, else "undetermined". Flat needs no lead: it is contained in all others, so that its lead
cannot exceed their penalty (3.7 with 12 points), and a lead of 4 would be impossible. "flat"
therefore reads: no change shown.

A veto: where a parabola in t with its lowest or highest point inside the range (4 parameters)
leads all of them by 4, the loss turns round, as a dev loss does when it falls and then overfits.
None of the shapes describes that: "undetermined".

Measured on falls of 1 to 3 nats with noise of 0.15 nats, steps right / called gradual: 16 points
0.96 / 0.00, 12 points 0.91 / 0.01, 10 points 0.74 / 0.05, 8 points 0.08 / 0.47. With noise of 0.05
ten points are enough (0.99). Steps claimed where there are none: at most 0.02 at any of these.

Losses are continuous and fitted one item at a time: a jump cannot come from a thresholded metric,
nor a smooth curve from averaging jumps. The guard against steps that are noise: residuals are drawn
anew around the fitted sigmoid, and emergence is claimed only where the step leads by 4 again in at
least 80 % of the draws. An item that falls in such a step is monogenic, one that falls gradually
polygenic.

Shape letters: N items, P points, M candidate shapes, D draws.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.sequence import learning_times
from tell_core.analysis.shapes import (
    Direction,
    Fit,
    aicc,
    fit_constant,
    fit_decay,
    fit_line,
    fit_parabola,
    fit_sigmoid,
    sigmoid_values,
)

Verdict = Literal["step", "gradual", "flat", "rising", "undetermined"]

VERDICTS: tuple[Verdict, ...] = ("step", "gradual", "flat", "rising", "undetermined")
MIN_POINTS = 8
MIN_LEAD = 4.0
MAX_STEP_WIDTH = 0.4
MIN_GUARD_SHARE = 0.8
_NUM_GUARD_DRAWS = 50
_GUARD_SEED = 0
_STEP_PARAMETERS = 5
REMARK = (
    "Fitted to the loss in nats of each item on its own: a continuous score, so that steps cannot"
    " come from the metric, and no average, so that steps are not smoothed away."
)

_CLASSES: tuple[Verdict, ...] = ("flat", "gradual", "step", "rising")
_REASON_CLOSE = f"no shape leads the others by {MIN_LEAD:g} in AICc"
_REASON_TURNS = "the loss turns round within the training"


@dataclass(frozen=True)
class ItemVerdict:
    """The shape of one item's loss curve.

    Attributes:
        verdict: The shape.
        reason: Why it is undetermined, else None.
        delta_aicc: AICc of the best shape of each class above the lowest of all.
        midpoint_step: Optimiser step at half of the fall, for a step.
        sharpness: Slope of the sigmoid in units of 1 / log(step + 1), for a step: its 10-90 % fall
            takes a factor of exp(4.39 / sharpness) in steps.
        drop: Loss at the first point minus loss at the last, in nats; None if not measured.
        guard_share: For a step: share of draws of its residuals in which it leads again.
    """

    verdict: Verdict
    reason: str | None
    delta_aicc: dict[str, float]
    midpoint_step: float | None
    sharpness: float | None
    drop: float | None
    guard_share: float | None = None

    @property
    def is_emergent(self) -> bool:
        """Whether a step may be claimed."""
        return (self.guard_share or 0.0) >= MIN_GUARD_SHARE


def item_verdicts(steps: npt.NDArray[np.integer], losses: FloatArray) -> list[ItemVerdict]:
    """Judge the loss curve of every item.

    Args:
        steps: Shape (P,). Optimiser steps, rising, from 0.
        losses: Shape (P, N). Loss of each item at each step, in nats.

    Returns:
        N verdicts. All are "undetermined" with fewer than `MIN_POINTS` points; so is an item with
        a loss that is not finite.
    """
    return shape_verdicts(np.log1p(steps.astype(np.float64)), losses)


def shape_verdicts(
    time: FloatArray, losses: FloatArray, *, is_guarded: bool = True
) -> list[ItemVerdict]:
    """Judge curves over any logarithmic scale, such as that of an amount of data.

    Args:
        time: Shape (P,). Logarithm of the scale, never falling; several measurements of one item
            at one scale, such as those of several seeds, stand side by side.
        losses: Shape (P, N). In nats.
        is_guarded: Whether steps go through the bootstrap, which takes most of the time.

    Returns:
        As `item_verdicts`; `MIN_POINTS` counts different scales.
    """
    if (num_scales := len(np.unique(time))) < MIN_POINTS:
        reason = f"{num_scales} points; at least {MIN_POINTS} are needed"
        return [_unjudged(curve, reason) for curve in losses.T]
    is_finite = np.asarray(np.isfinite(losses).all(axis=0))
    judged = iter(_judge(time, losses.T[is_finite], is_guarded))
    return [
        next(judged) if finite else _unjudged(curve, "a loss is not a finite number")
        for finite, curve in zip(is_finite, losses.T, strict=True)
    ]


def emergence_of_cell(
    steps: npt.NDArray[np.integer], losses: FloatArray, items: Sequence[str], roles: Sequence[str]
) -> dict[str, Any]:
    """One entry of ``cells`` in emergence.json.

    Args:
        steps: Shape (P,). Probe steps.
        losses: Shape (P, N). Losses of the probe items.
        items: N names.
        roles: N roles, "task", "general" or "retention".
    """
    verdicts = item_verdicts(steps, losses)
    rows = [
        {
            "item": item,
            "role": role,
            **vars(verdict),
            **learned,
            "losses": [float(loss) if np.isfinite(loss) else None for loss in curve],
        }
        for item, role, verdict, learned, curve in zip(
            items, roles, verdicts, _learning(steps, losses), losses.T, strict=True
        )
    ]
    return {"steps": steps.tolist(), "items": rows, "counts": _counts(rows)}


def emergence_summary(cells: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Shares of verdicts by arm and by role of the items, over all cells of the arm.

    Args:
        cells: Pairs of an arm and an entry of `emergence_of_cell`.

    Returns:
        By arm: ``num_cells``, and by role ``num_curves``, ``counts``, ``shares``, the median step
        and drop of the curves that are steps, the shares of monogenic and polygenic curves among
        those that fall (steps that pass the guard; gradual falls; the rest is open), and the share
        of curves learned by the end, among those with something to learn.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for arm, cell in cells:
        by_arm.setdefault(arm, []).append(cell)
    return {arm: _arm_summary(entries) for arm, entries in by_arm.items()}


def _arm_summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for cell in cells for row in cell["items"]]
    roles = {
        role: [row for row in rows if row["role"] == role]
        for role in dict.fromkeys(row["role"] for row in rows)
    }
    return {"num_cells": len(cells), **{role: _shares(group) for role, group in roles.items()}}


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts = _counts(rows)
    stepped = [row for row in rows if row["verdict"] == "step"]
    return {
        "num_curves": len(rows),
        "counts": counts,
        "shares": {verdict: count / len(rows) for verdict, count in counts.items()},
        **_genic_shares(rows),
        "learned_share": _share([row["is_learned"] for row in rows if not row["was_known"]]),
        "median_midpoint_step": _median([row["midpoint_step"] for row in stepped]),
        "median_step_drop": _median([row["drop"] for row in stepped]),
    }


def _genic_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    falling = [row for row in rows if row["verdict"] in ("step", "gradual")]
    return {
        "monogenic_share": _share(
            [(row["guard_share"] or 0) >= MIN_GUARD_SHARE for row in falling]
        ),
        "polygenic_share": _share([row["verdict"] == "gradual" for row in falling]),
    }


def _learning(steps: npt.NDArray[np.integer], losses: FloatArray) -> list[dict[str, Any]]:
    """When each item was learned; the last step where it was not."""
    times = learning_times(steps, losses)
    return [
        {"learning_step": float(np.expm1(time)), "is_learned": learned, "was_known": known}
        for time, learned, known in zip(
            times.log_times, times.is_learned.tolist(), times.was_known.tolist(), strict=True
        )
    ]


def _share(found: Sequence[bool]) -> float | None:
    return float(np.mean(found)) if found else None


def _counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    found = Counter(row["verdict"] for row in rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _unjudged(curve: FloatArray, reason: str) -> ItemVerdict:
    drop = float(curve[0] - curve[-1]) if len(curve) else np.nan
    return ItemVerdict("undetermined", reason, {}, None, None, drop if np.isfinite(drop) else None)


def _judge(time: FloatArray, curves: FloatArray, is_guarded: bool) -> list[ItemVerdict]:
    """Verdicts of curves (N, P) without gaps at times (P,)."""
    scores, step = _class_scores(time, curves)
    turning = aicc(fit_parabola(time, curves), len(time), 4) - scores.min(axis=1)
    deltas = scores - scores.min(axis=1, keepdims=True)
    drops = curves[:, 0] - curves[:, -1]
    verdicts = [
        _verdict(delta, turn <= -MIN_LEAD, parameters, drop)
        for delta, turn, parameters, drop in zip(deltas, turning, step, drops, strict=True)
    ]
    return [
        replace(verdict, guard_share=_guard_share(time, curve))
        if is_guarded and verdict.verdict == "step"
        else verdict
        for verdict, curve in zip(verdicts, curves, strict=True)
    ]


def _guard_share(time: FloatArray, curve: FloatArray) -> float:
    """Share of draws of the residuals (D, P) around the sigmoid in which the step leads by 4."""
    fitted = sigmoid_values(
        time, curve[None], fit_sigmoid(time, curve[None], "down", MAX_STEP_WIDTH)
    )
    residuals = (curve - fitted[0]) * np.sqrt(len(time) / (len(time) - _STEP_PARAMETERS))
    generator = np.random.default_rng(_GUARD_SEED)
    chosen = generator.integers(len(time), size=(_NUM_GUARD_DRAWS, len(time)))
    drawn = fitted + residuals[chosen]
    step = aicc(fit_sigmoid(time, drawn, "down", MAX_STEP_WIDTH), len(time), _STEP_PARAMETERS)
    others = [(fit_constant(drawn), 2), *_smooth_fits(time, drawn, "down")]
    best = np.min([aicc(fit, len(time), count) for fit, count in others], axis=0)
    return float(np.mean(step - best <= -MIN_LEAD))


def _verdict(delta: FloatArray, is_turning: bool, step: FloatArray, drop: float) -> ItemVerdict:
    best = _CLASSES[int(delta.argmin())]
    is_decided = best == "flat" or np.sort(delta)[1] >= MIN_LEAD
    verdict = best if is_decided and not is_turning else "undetermined"
    reason = _REASON_TURNS if is_turning else None if is_decided else _REASON_CLOSE
    is_step = verdict == "step"
    return ItemVerdict(
        verdict=verdict,
        reason=reason,
        delta_aicc=dict(zip(_CLASSES, delta.tolist(), strict=True)),
        midpoint_step=float(np.expm1(step[0])) if is_step else None,
        sharpness=float(step[1]) if is_step else None,
        drop=float(drop),
    )


def _class_scores(time: FloatArray, curves: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lowest AICc of each class, shape (N, 4), and middle and sharpness of the steps (N, 2)."""
    step = fit_sigmoid(time, curves, "down", MAX_STEP_WIDTH)
    rise = fit_sigmoid(time, curves, "up", MAX_STEP_WIDTH)
    fits = (
        [(fit_constant(curves), 2)],
        _smooth_fits(time, curves, "down"),
        [(step, _STEP_PARAMETERS)],
        [*_smooth_fits(time, curves, "up"), (rise, _STEP_PARAMETERS)],
    )
    columns = [
        np.min([aicc(fit, len(time), count) for fit, count in group], axis=0) for group in fits
    ]
    return np.stack(columns, axis=1), step.parameters


def _smooth_fits(
    time: FloatArray, curves: FloatArray, direction: Direction
) -> list[tuple[Fit, int]]:
    return [(fit_line(time, curves, direction), 3), (fit_decay(time, curves, direction), 4)]
