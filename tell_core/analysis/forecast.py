"""Forecast of learning curves: what more task data would bring, and how much a score would take.

A forecast is made for each curve of `tell`, `sft` and `sft_matched` that has at least three
amounts of task tokens and two seeds, up to `HORIZON_FACTOR` times its largest. It is about the
mean of as many seeds on the same test items; see `growth` for the curves that it is drawn from.
These never fall: a curve that does, by more than chance, has no forecast, nor has one that no such
curve comes near.

Whether it can be believed is tried out in the same run: a curve is fitted to its first budgets
alone and forecast at the larger ones, where the scores are known.

Shape letters: K budgets, S seeds, M draws, T amounts of task tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tell_core.analysis.curves import NO_SCORE, ONE_SEED, CurvePoint
from tell_core.analysis.growth import GrowthCurves
from tell_core.analysis.growth_posterior import grow
from tell_core.analysis.leverage import common_seeds
from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.words import ARM_WORDS, count
from tell_core.evaluation.base import Metric
from tell_core.spec.arms import SFT_ARMS
from tell_core.spec.model import AnalysisSpec

HORIZON_FACTOR = 4
MIN_BUDGETS = 3
MIN_EFFECTIVE_DRAWS = 100
ARMS = ("tell", *SFT_ARMS)
_GAIN_FACTORS = (1.5, 2.0, 4.0)
_NUM_BAND, _NUM_BETWEEN = 41, 4  # points of the band, and steps between them for inverting
_HELD_OUT = (1, 2)  # how many of the largest budgets a back-test holds out
# A fall is one beyond chance at this level over all earlier budgets, and this share of the range.
_FALL_LEVEL, _LEAST_FALL = 0.05, 0.05
# Whole examples seldom fill a budget: 3834 of 3840 tokens are 4.03 times 951 of 960.
_SLACK = 1.1
_BY_CURVE = "by the fitted curve alone"
_BY_LUCK = "by the measured mean; the fitted curves allow that noise helped it"


class Target(NamedTuple):
    """A score to reach, and what it is in plain words."""

    label: str
    score: float


@dataclass(frozen=True)
class MeasuredCurve:
    """Scores of one arm, turned so that higher is better.

    Attributes:
        arm: Name of the arm.
        general_budget_tokens: General budget, or None.
        tokens: Shape (K,). Task tokens really used, strictly rising.
        scores: Shape (S, K).
        limits: Lowest and highest score there can be, turned round likewise.
        sign: 1, or -1 where lower scores are better.
        resolution: Half of what one item can change a score by; 0 where that has no limit.
    """

    arm: str
    general_budget_tokens: int | None
    tokens: FloatArray
    scores: FloatArray
    limits: tuple[float, float]
    sign: float
    resolution: float

    @classmethod
    def of(cls, metric: Metric, points: Sequence[CurvePoint]) -> "MeasuredCurve":
        """The curve through ``points`` of one arm; budgets that used up the pool count once."""
        seeds = common_seeds(points)
        sign = 1.0 if metric.higher_is_better else -1.0
        scores = np.stack([sign * point.select(seeds).scores for point in points], axis=1)
        used = np.asarray([point.task_tokens.mean() for point in points])
        tokens, place = np.unique(used, return_inverse=True)
        share = (place[:, None] == np.arange(len(tokens))).astype(np.float64)
        low, high = sorted(sign * limit for limit in metric.limits)
        span = high - low
        return cls(
            arm=points[0].arm,
            general_budget_tokens=points[0].general_budget_tokens,
            tokens=tokens,
            scores=scores @ (share / share.sum(axis=0)),
            limits=(low, high),
            sign=sign,
            resolution=span / (2 * points[0].num_items) if np.isfinite(span) else 0.0,
        )

    @property
    def means(self) -> FloatArray:
        """Mean scores, shape (K,)."""
        return np.asarray(self.scores.mean(axis=0))

    def why_undefined(self, num_budgets: int) -> str | None:
        """Why the first ``num_budgets`` budgets allow no forecast, or None."""
        scores = self.scores[:, :num_budgets]
        if min(scores.shape[1], num_budgets) < MIN_BUDGETS:
            return f"fewer than {MIN_BUDGETS} amounts of task tokens: too few to see a curve bend"
        if len(scores) < 2:
            return ONE_SEED
        if not np.isfinite(scores).all():
            return NO_SCORE
        if not scores.any():
            return "all-zero scores: there is no curve to continue"
        if np.ptp(scores) == 0:
            return "the metric is constant: every training has the same score"
        return _why_falling(self.tokens[:num_budgets], scores, self.sign)


def _why_falling(tokens: FloatArray, scores: FloatArray, sign: float) -> str | None:
    """Why no growth curve fits: the mean at the last of K budgets is below the best earlier one.

    Below by more than `_LEAST_FALL` of the range of the means, and by more than chance: one-sided
    t-test, paired over the seeds, at `_FALL_LEVEL` over K - 1 (any earlier budget could have been
    the best by luck). The variance of a difference is that of the pairs, or that which all budgets
    show together, whichever is larger: two or three pairs alone may agree by luck.

    Args:
        tokens: Shape (K,), K >= 2.
        scores: Shape (S, K), S >= 2, finite; higher is better.
        sign: -1 where the metric was turned round.
    """
    (num_seeds, num_budgets), means = scores.shape, scores.mean(axis=0)
    best = int(means[:-1].argmax())
    fall = means[best] - means[-1]
    freedom = (num_seeds - 1) * (num_budgets - 1)
    noise = scores - means - (scores.mean(axis=1, keepdims=True) - scores.mean())
    variance = max(2 * (noise**2).sum() / freedom, (scores[:, best] - scores[:, -1]).var(ddof=1))
    reach = stats.t.ppf(1 - _FALL_LEVEL / (num_budgets - 1), freedom) * np.sqrt(
        variance / num_seeds
    )
    if fall <= max(reach, _LEAST_FALL * np.ptp(means)):
        return None
    worse, than = ("falls", "below") if sign > 0 else ("rises, which is worse,", "above")
    return (
        f"the score {worse} with more task data: at {count(round(tokens[-1]))} tokens it lies"
        f" {than} that at {count(round(tokens[best]))} by more than its noise; no growth curve fits"
    )


def why_unfitted(curves: GrowthCurves) -> str | None:
    """Why drawn curves say nothing, or None: hardly any of those tried comes near the scores."""
    if curves.effective_draws >= MIN_EFFECTIVE_DRAWS:
        return None
    return (
        f"no growth curve fits: the draws are worth {curves.effective_draws:.0f} independent ones,"
        f" fewer than {MIN_EFFECTIVE_DRAWS}"
    )


def forecast_metric(
    metric: Metric, points: Sequence[CurvePoint], analysis: AnalysisSpec
) -> dict[str, Any]:
    """One entry of ``metrics`` in forecast.json."""
    curves = [
        forecast_curve(
            MeasuredCurve.of(metric, group), _targets(group, points, metric, analysis), analysis
        )
        for group in _by_curve(points)
    ]
    tests = [test for curve in curves for test in curve["backtests"]]
    num_covered = sum(test["is_covered"] for test in tests)
    return {
        "calibration": {
            "nominal": analysis.forecast_confidence,
            "num_backtests": len(tests),
            "num_covered": num_covered,
            "coverage": num_covered / len(tests) if tests else None,
        },
        "curves": curves,
    }


def forecast_curve(
    curve: MeasuredCurve, targets: Sequence[Target], analysis: AnalysisSpec
) -> dict[str, Any]:
    """One entry of ``curves`` in forecast.json; "undefined", with a reason, where need be."""
    num_seeds, num_budgets = curve.scores.shape
    entry: dict[str, Any] = {
        "arm": curve.arm,
        "general_budget_tokens": curve.general_budget_tokens,
        "num_budgets": num_budgets,
        "num_seeds": num_seeds,
        "status": "ok",
        "reason": curve.why_undefined(num_budgets),
        "effective_draws": None,
        "max_task_tokens": float(curve.tokens[-1]),
        "targets": [],
        "gains": [],
        "band": [],
        "backtests": [],
    }
    if entry["reason"] is not None:
        return _undefined(entry, targets)
    curves = grow(curve.tokens, curve.scores, curve.limits, seed=analysis.seed)
    entry |= {"effective_draws": curves.effective_draws, "reason": why_unfitted(curves)}
    if entry["reason"] is not None:
        return _undefined(entry, targets)
    grid = _grid(curve.tokens)
    expected = curves.at(grid)
    return entry | {
        "targets": [_target_row(curve, grid, expected, target, analysis) for target in targets],
        "gains": _gains(curve, curves, analysis),
        "band": _rows(curve, curves, grid[::_NUM_BETWEEN], analysis),
        "backtests": _backtests(curve, analysis),
    }


def tokens_to_reach(grid: FloatArray, expected: FloatArray, target: float) -> FloatArray:
    """Task tokens at which each curve first reaches a score.

    Args:
        grid: Shape (T,), rising. Task tokens.
        expected: Shape (M, T). Scores there, higher is better; between them straight in log n.
        target: The score.

    Returns:
        Shape (M,). ``grid[0]`` where the curve starts above the target, inf where it ends below.
    """
    highest = np.maximum.accumulate(expected, axis=1)
    is_reached = highest >= target
    right = np.maximum(is_reached.argmax(axis=1), 1)
    row, left = np.arange(len(expected)), right - 1
    below, above = highest[row, left], highest[row, right]
    climb = np.where(above > below, above - below, 1.0)
    share = np.clip((target - below) / climb, 0.0, 1.0)
    log_grid = np.log(grid)
    tokens = np.exp(log_grid[left] + share * (log_grid[right] - log_grid[left]))
    return np.where(is_reached.any(axis=1), tokens, np.inf)


def _by_curve(points: Sequence[CurvePoint]) -> list[list[CurvePoint]]:
    """Points of one arm and general budget together, in the order of `ARMS`."""
    groups: dict[tuple[str, int], list[CurvePoint]] = {}
    for point in points:
        if point.arm in ARMS:
            key = point.arm, point.general_budget_tokens or 0
            groups.setdefault(key, []).append(point)
    return [groups[key] for key in sorted(groups, key=lambda key: (ARMS.index(key[0]), key[1]))]


def _targets(
    curve: Sequence[CurvePoint],
    points: Sequence[CurvePoint],
    metric: Metric,
    analysis: AnalysisSpec,
) -> list[Target]:
    """The score asked for; for SFT what TELL reaches, for TELL the best score of any arm."""
    targets = []
    if analysis.target_score is not None and metric.name == analysis.primary_metric:
        targets.append(Target(f"a score of {analysis.target_score:g}", analysis.target_score))
    if curve[0].arm in SFT_ARMS:
        return targets + _tell_targets(curve[0], points)
    sign = 1.0 if metric.higher_is_better else -1.0
    scored = [point for point in points if np.isfinite(point.scores).all()]
    best = max(scored, key=lambda point: sign * point.scores.mean(), default=None)
    if best is None or any(best is point for point in curve):
        return targets
    label = f"the best score of any arm ({_where(best)})"
    return [*targets, Target(label, float(best.scores.mean()))]


def _tell_targets(sft: CurvePoint, points: Sequence[CurvePoint]) -> list[Target]:
    """Scores of TELL at its largest task budget, for every general budget that fits."""
    fitting: dict[int | None, CurvePoint] = {}
    for point in points:
        is_fitting = sft.general_budget_tokens in (None, point.general_budget_tokens)
        if point.arm == "tell" and is_fitting and np.isfinite(point.scores).all():
            largest = fitting.get(point.general_budget_tokens, point)
            is_larger = (point.task_budget_tokens or 0) >= (largest.task_budget_tokens or 0)
            fitting[point.general_budget_tokens] = point if is_larger else largest
    return [
        Target(
            f"what TELL reaches with {count(point.task_budget_tokens)} task tokens"
            + (f" and {count(general)} general tokens" if len(fitting) > 1 else ""),
            float(point.scores.mean()),
        )
        for general, point in fitting.items()
    ]


def _where(point: CurvePoint) -> str:
    arm = ARM_WORDS.get(point.arm, f"arm {point.arm}")
    if point.task_budget_tokens is None:
        return arm
    return f"{arm} with {count(point.task_budget_tokens)} task tokens"


def _grid(tokens: FloatArray) -> FloatArray:
    num_points = (_NUM_BAND - 1) * _NUM_BETWEEN + 1
    return np.geomspace(tokens[0], tokens[-1] * HORIZON_FACTOR, num_points)


def _target_row(
    curve: MeasuredCurve,
    grid: FloatArray,
    expected: FloatArray,
    target: Target,
    analysis: AnalysisSpec,
) -> dict[str, Any]:
    """Tokens to a target. "reached" also where a measured mean is there, whatever the curves."""
    score = curve.sign * target.score - curve.resolution
    needed = tokens_to_reach(grid, expected, score)
    largest = float(curve.tokens[-1])
    is_measured = curve.means >= score
    tail = (1 - analysis.forecast_confidence) / 2
    low, median, high = (_quantile(needed, at) for at in (tail, 0.5, 1 - tail))
    if is_measured.any():
        # What was measured needs no more; by the curves it may have been luck, up to ``high``.
        low = median = float(curve.tokens[is_measured.argmax()])
        status, reason = "reached", _BY_LUCK if high > largest else None
    elif median <= largest:
        status, reason = "reached", _BY_CURVE
    elif np.isfinite(median):
        status, reason = "needs_more", None
    else:
        status, reason = "beyond_horizon", "not reached within the horizon of the forecast"
    is_beyond = status == "beyond_horizon"
    return {
        "label": target.label,
        "score": target.score,
        "status": status,
        "tokens": None if is_beyond else median,
        "more_tokens": None if is_beyond else max(median - largest, 0.0),
        "low": max(low - largest, 0.0) if np.isfinite(low) else None,
        "high": max(high - largest, 0.0) if np.isfinite(high) else None,
        "reason": reason,
    }


def _undefined(entry: dict[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """The entry of a curve without a forecast, all of whose targets have its reason."""
    missing = [_undefined_target(target, entry["reason"]) for target in targets]
    return entry | {"status": "undefined", "targets": missing}


def _undefined_target(target: Target, reason: str) -> dict[str, Any]:
    missing = dict.fromkeys(("tokens", "more_tokens", "low", "high"))
    return {
        "label": target.label,
        "score": target.score,
        "status": "undefined",
        **missing,
        "reason": reason,
    }


def _gains(
    curve: MeasuredCurve, curves: GrowthCurves, analysis: AnalysisSpec
) -> list[dict[str, Any]]:
    largest = float(curve.tokens[-1])
    rows = _rows(curve, curves, largest * np.asarray(_GAIN_FACTORS), analysis)
    return [{"more_tokens": row["task_tokens"] - largest} | row for row in rows]


def _backtests(curve: MeasuredCurve, analysis: AnalysisSpec) -> list[dict[str, Any]]:
    """Forecasts of the larger budgets from the smaller ones, inside the horizon of these."""
    found = []
    for held_out in _HELD_OUT:
        num_fitted = len(curve.tokens) - held_out
        if curve.why_undefined(num_fitted) is not None:
            continue
        fitted, larger = curve.tokens[:num_fitted], curve.tokens[num_fitted:]
        is_near = larger <= _SLACK * HORIZON_FACTOR * fitted[-1]
        scores = curve.scores[:, :num_fitted]
        curves = grow(fitted, scores, curve.limits, seed=analysis.seed)
        if why_unfitted(curves) is not None:
            continue
        rows = _rows(curve, curves, larger[is_near], analysis)
        observed = (curve.sign * curve.means[num_fitted:][is_near]).tolist()
        found += [_backtest(fitted, row, at) for row, at in zip(rows, observed, strict=True)]
    return found


def _backtest(fitted: FloatArray, row: Mapping[str, Any], observed: float) -> dict[str, Any]:
    rounding = 1e-9 * (1 + abs(observed))
    return {
        "fitted_on": fitted.tolist(),
        **row,
        "observed": observed,
        "is_covered": row["low"] - rounding <= observed <= row["high"] + rounding,
    }


def _rows(
    curve: MeasuredCurve, curves: GrowthCurves, tokens: FloatArray, analysis: AnalysisSpec
) -> list[dict[str, Any]]:
    """Median and interval of the mean over as many seeds, at each amount of task tokens."""
    means = curve.sign * curves.means(tokens, len(curve.scores), analysis.seed)
    tail = (1 - analysis.forecast_confidence) / 2
    low, middle, high = np.quantile(means, [tail, 0.5, 1 - tail], axis=0).tolist()
    rows = zip(tokens.tolist(), middle, low, high, strict=True)
    return [dict(zip(("task_tokens", "score", "low", "high"), row, strict=True)) for row in rows]


def _quantile(values: FloatArray, share: float) -> float:
    """A quantile that is one of the values, so that infinite ones do no harm."""
    return float(np.quantile(values, share, method="inverted_cdf"))
