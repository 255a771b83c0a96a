"""Scaling of a finished run: how the mean loss falls over steps and budgets of every trained arm.

Over steps the loss is that of the probe items, task and general apart, at the smallest task budget
and the largest general budget. Over budgets it is that of test items and of held-out general items
after training: over task budgets at the largest general budget, over general budgets at the
smallest task budget. More data of either kind are more steps, too.

Where the use of the general items' skills is known, the slope that finitely many skills predict
stands beside the measured one (`tell_core.analysis.scaling.finite_k`). What share of the mixture
general data are changes all use frequencies by one factor, and no slope.

Shape letters: S seeds, n points, N probe items, P probes, K skills.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.curves import CurvePoint, finite_or_none
from tell_core.analysis.resampling import FloatArray, student_interval
from tell_core.analysis.run_cells import RunCells, traced
from tell_core.analysis.scaling import (
    MIN_POINTS,
    FiniteK,
    asymptotic_slope,
    finite_k,
    fit_scaling,
    on_common_scale,
    zipf_fit,
)
from tell_core.analysis.sequence import learning_times
from tell_core.analysis.traces import CellTrace
from tell_core.analysis.use_frequency import MIN_LABELS, labelled_items, use_frequencies
from tell_core.errors import AnalysisError
from tell_core.spec.arms import parse_arm

SCALING_FILE = "scaling.json"
STEPS, TASK_TOKENS, GENERAL_TOKENS = "steps", "task_tokens", "general_tokens"
ROLES = {"task": "log_probability", "general": "general_log_probability"}
NO_USE = (
    "the use of skills is not known: `analysis.quantum_column` names the column of the general data"
    " that says which skill an example needs"
)


class Curve(NamedTuple):
    """The mean loss of an arm over a scale.

    Attributes:
        kind: Of the scale: steps (step + 1), task tokens or general tokens.
        arm: Name of the arm.
        role: Whose loss, "task" or "general".
        x: Shape (n,), rising.
        losses: Shape (S, n). Mean loss in nats per token, of each seed.
    """

    kind: str
    arm: str
    role: str
    x: FloatArray
    losses: FloatArray


def measure_scaling(run: RunCells, curated: Path | None) -> dict[str, Any]:
    """The content of ``scaling.json``.

    Args:
        run: The cells of the run.
        curated: Directory of its curated data, for the use of skills in the general data.

    Raises:
        AnalysisError: Files of a training are missing or damaged.
    """
    confidence = run.resampling.confidence
    curves = [*_over_steps(run), *_over_budgets(run)]
    return {
        "confidence": confidence,
        "min_points": MIN_POINTS,
        "task_budget_tokens": run.task_budget,
        "general_budget_tokens": run.general_budget,
        "curves": [_curve_row(curve, confidence) for curve in curves],
        "finite_k": _finite_k_rows(run, curated, confidence),
    }


def _trained_arms(run: RunCells) -> list[str]:
    arms = dict.fromkeys(cell.arm for cell in run.cells)
    return [arm for arm in arms if parse_arm(arm).is_trained]


def _chosen(run: RunCells, arm: str) -> list[tuple[AnalysedCell, CellTrace]]:
    """The trained cells of an arm at the budgets chosen for all."""
    return traced([cell for cell in run.of(arm) if run.is_chosen(cell)])


def _over_steps(run: RunCells) -> Iterator[Curve]:
    for arm in _trained_arms(run):
        cells = _chosen(run, arm)
        for role in ROLES if cells else ():
            if all(role in trace.roles for _, trace in cells):
                parts = [(_scale(trace), _mean_loss(trace, role)) for _, trace in cells]
                yield Curve(STEPS, arm, role, *on_common_scale(parts))


def _scale(trace: CellTrace) -> FloatArray:
    """Optimiser steps at the probes plus 1, in which the untrained model has a place too."""
    return np.asarray(trace.steps + 1, dtype=np.float64)


def _mean_loss(trace: CellTrace, role: str) -> FloatArray:
    """Mean over the items of a role, shape (P,)."""
    chosen = np.array([one == role for one in trace.roles])
    return np.asarray(trace.losses[:, chosen].mean(axis=1))


def _over_budgets(run: RunCells) -> Iterator[Curve]:
    for arm in _trained_arms(run):
        for role, metric in ROLES.items():
            points = [point for point in run.scores.get(metric, ()) if point.arm == arm]
            at_general = [
                p for p in points if p.general_budget_tokens in (None, run.general_budget)
            ]
            at_task = [p for p in points if p.task_budget_tokens in (None, run.task_budget)]
            tokens = {p.task_budget_tokens or 0: float(p.task_tokens.mean()) for p in at_general}
            yield from _budget_curve(TASK_TOKENS, role, at_general, tokens)
            budgets = {p.general_budget_tokens or 0: float(p.general_budget_tokens or 0)
                       for p in at_task}  # fmt: skip
            yield from _budget_curve(GENERAL_TOKENS, role, at_task, budgets)


def _budget_curve(
    kind: str, role: str, points: Sequence[CurvePoint], tokens: Mapping[int, float]
) -> Iterator[Curve]:
    """The curve through points of at least two budgets, seeds that all of them have.

    Budgets beyond the data, of equal tokens, count once.
    """
    name = "task_budget_tokens" if kind == TASK_TOKENS else "general_budget_tokens"
    by_tokens = {tokens[getattr(p, name) or 0]: p for p in reversed(points)}
    found = [(x, by_tokens[x]) for x in sorted(by_tokens) if x > 0]
    if len(found) < 2:
        return
    seeds = [s for s in found[0][1].seeds if all(s in point.seeds for _, point in found)]
    losses = np.stack([-point.select(seeds).scores for _, point in found], axis=1)
    if seeds:
        yield Curve(kind, found[0][1].arm, role, np.array([x for x, _ in found]), losses)


def _curve_row(curve: Curve, confidence: float) -> dict[str, Any]:
    fit = fit_scaling(curve.x, curve.losses, confidence)
    points = [
        {"x": float(x), **_over_seeds(losses, confidence), "seeds": losses.tolist()}
        for x, losses in zip(curve.x, curve.losses.T, strict=True)
        if np.isfinite(losses).all()
    ]
    head = {"kind": curve.kind, "arm": curve.arm, "role": curve.role}
    return head | vars(fit) | {"points": points}


def _over_seeds(values: FloatArray, confidence: float) -> dict[str, float | None]:
    """Mean over seeds with Student's interval; without ends for one seed."""
    ends = (float(end[0]) for end in student_interval(values[:, None], confidence))
    return dict(zip(("mean", "low", "high"), map(finite_or_none, ends), strict=True))


def _finite_k_rows(run: RunCells, curated: Path | None, confidence: float) -> dict[str, Any]:
    """The finite-K slope of every arm that trains on general data, or why there is none."""
    column = run.spec.analysis.quantum_column
    if column is None:
        return {"reason": NO_USE, "arms": []}
    frequencies = use_frequencies(curated, column)
    if len(frequencies) < MIN_LABELS:
        return {
            "reason": f"`{column}` names {len(frequencies)} skills in the general data; at least"
            f" {MIN_LABELS} are needed",
            "arms": [],
        }
    arms = [arm for arm in _trained_arms(run) if parse_arm(arm).uses_general]
    rows = [_finite_k_row(run, arm, frequencies, column, confidence) for arm in arms]
    return {"reason": None, "arms": [row for row in rows if row is not None]}


def _finite_k_row(
    run: RunCells, arm: str, frequencies: Mapping[str, float], column: str, confidence: float
) -> dict[str, Any] | None:
    cells = _chosen(run, arm)
    if not cells:
        return None
    head = {"arm": arm, "num_quanta": len(frequencies), "num_known": 0, "num_seeds": len(cells)}
    try:
        # Training starts at the same weights in all seeds: the first says what was known before.
        known = labelled_items(*cells[0], column, frequencies).known
        open_ = {name: share for name, share in frequencies.items() if name not in known}
        found = [_predicted(cell, trace, open_, column) for cell, trace in cells]
    except AnalysisError as error:
        return head | {"reason": str(error)}
    measured = np.array([one.slope for one, _ in found])
    predicted = np.array([one.predicted_slope for one, _ in found])
    beta = float(np.mean([one.beta for one, _ in found]))
    zipf = zipf_fit(np.array(list(open_.values())))
    limit = None if zipf.alpha is None else asymptotic_slope(zipf.alpha, beta)
    return head | {
        "num_quanta": len(open_),
        "num_known": len(known),
        "reason": None,
        "beta": _over_seeds(np.array([one.beta for one, _ in found]), confidence),
        "sharpness": float(np.mean([one.sharpness for one, _ in found])),
        "scatter": float(np.mean([one.scatter for one, _ in found])),
        "slope": _over_seeds(measured, confidence),
        "predicted_slope": _over_seeds(predicted, confidence),
        "difference": _over_seeds(measured - predicted, confidence),
        "zipf_alpha": zipf.alpha,
        "asymptotic_slope": limit,
        "left": float(np.mean([mean[-1] / mean[0] for _, mean in found])),
        "predicted_left": float(np.mean([one.predicted[-1] for one, _ in found])),
        "asymptotic_reason": zipf.reason or (None if limit is not None else "β is not above 0"),
        "points": _finite_k_points(found),
    }


def _predicted(
    cell: AnalysedCell, trace: CellTrace, frequencies: Mapping[str, float], column: str
) -> tuple[FiniteK, FloatArray]:
    """The finite-K slope of one training, and the mean loss of its items, shape (P,).

    The frequencies are those of skills that may have something to learn: those known before have
    no part in the mean loss of the items that do.
    """
    items = labelled_items(cell, trace, column, frequencies)
    if len(set(items.labels)) < MIN_LABELS:
        raise AnalysisError(
            f"held-out general items of {len(set(items.labels))} skills have something to learn; at"
            f" least {MIN_LABELS} skills are needed"
        )
    times = learning_times(trace.steps, trace.losses).select(items.places)
    losses = trace.losses[:, items.places]
    use = np.array([frequencies[label] for label in items.labels])
    everything = np.array(list(frequencies.values()))
    mean = losses.mean(axis=1)
    return finite_k(_scale(trace), losses, times, use, everything, mean), mean


def _finite_k_points(found: Sequence[tuple[FiniteK, FloatArray]]) -> list[dict[str, float]]:
    """Means over seeds, the prediction brought to the measured height, which it does not know."""
    x, measured = on_common_scale([(one.x, mean[-len(one.x) :]) for one, mean in found])
    _, predicted = on_common_scale([(one.x, one.predicted) for one, _ in found])
    logs = np.log(predicted).mean(axis=0)
    logs += np.log(measured).mean() - logs.mean()
    rows = zip(x, np.exp(np.log(measured).mean(axis=0)), np.exp(logs), strict=True)
    return [{"x": float(x), "measured": float(m), "predicted": float(p)} for x, m, p in rows]
