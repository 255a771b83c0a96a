"""The price: what training costs on abilities that are not the task's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tell_core.analysis.curves import NO_SCORE, ONE_SEED, CurvePoint
from tell_core.analysis.resampling import FloatArray, Resampling, interval
from tell_core.evaluation.base import Metric

BASE = "base"
_NO_BASE = "arm base was not run: there is nothing to compare with"
_CONSTANT = "no seed or item differs: what another would change is unknown"


def price_rows(
    metric: Metric, points: Sequence[CurvePoint], resampling: Resampling
) -> list[dict[str, Any]]:
    """Entries of ``price`` in leverage.json: change of each arm against the base model.

    The change is the mean score minus that of arm base on the same items, turned so that a positive
    one means better kept. Its interval covers seeds and items, these paired.

    Args:
        metric: A metric on items that are not the task's.
        points: All points of the metric, base among them.
        resampling: How the interval is made.
    """
    base = next((point for point in points if point.arm == BASE), None)
    return [_row(metric, point, base, resampling) for point in points if point.arm != BASE]


def _row(
    metric: Metric, point: CurvePoint, base: CurvePoint | None, resampling: Resampling
) -> dict[str, Any]:
    change: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = _NO_BASE
    if base is not None:
        sign = 1.0 if metric.higher_is_better else -1.0
        difference = sign * (point.rows(resampling) - base.rows(resampling))
        change, low, high, reason = _change(point, difference, resampling)
    return {
        "metric": metric.name,
        "arm": point.arm,
        "task_budget_tokens": point.task_budget_tokens,
        "general_budget_tokens": point.general_budget_tokens,
        "change": change,
        "low": low,
        "high": high,
        "num_items": point.num_items,
        "num_seeds": len(point.seeds),
        "reason": reason,
    }


def _change(
    point: CurvePoint, difference: FloatArray, resampling: Resampling
) -> tuple[float | None, float | None, float | None, str | None]:
    """Change, interval, and why one of them is missing; ``difference`` has shape (R,)."""
    change, draws = float(difference[0]), difference[1:]
    if not np.isfinite(change):
        return None, None, None, NO_SCORE
    if point.varies_with_seed and len(point.seeds) < 2:
        return change, None, None, ONE_SEED
    if np.ptp(draws) < 1e-12:
        return change, None, None, _CONSTANT
    is_missing = np.isnan(draws)
    lower, upper = np.where(is_missing, -np.inf, draws), np.where(is_missing, np.inf, draws)
    return change, *interval(lower, upper, resampling.confidence), None
