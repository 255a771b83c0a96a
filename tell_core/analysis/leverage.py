"""The leverage ratio: task tokens SFT needs to reach TELL's score, divided by TELL's own.

The curve of an SFT arm is the isotonic regression of its score on log task tokens, joined between
budgets by monotone cubic pieces (Fritsch and Carlson 1980). Straight pieces overstate the tokens
needed on a curve that flattens: 5.3 to 5.7 instead of 5 in simulations with budgets three to four
times apart. Nothing is extrapolated: outside the measured budgets there is a bound.

Each draw of seeds and items gives a bracket [lower, upper] of the ratio: both ends equal where
the score is reached inside the measured range, [max / b, inf] where it is never reached,
[0, min / b] where the smallest budget already reaches it. The interval runs from the low quantile
of the lower ends to the high quantile of the upper ends.

Measured on simulated studies with a true ratio of 5, six SFT budgets, 300 items, binary and
continuous scores, seed noise of 0.05 to 0.4 in units of log tokens, budgets 2 to 4 times apart (200
studies each): the median estimate lies between 4.96 and 5.21, and 95 % intervals cover in 0.955 to
0.995 (3 seeds) and 0.925 to 1.0 (5 seeds) of the studies. The price is width: at the largest seed
noise the ends are 7 times apart with 3 seeds, 2.5 times with 5, and mostly unbounded with 2.

Shape letters: R rows (the estimate, then the draws), K budgets.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from tell_core.analysis.curves import NO_SCORE, ONE_SEED, CurvePoint, finite_or_none
from tell_core.analysis.multiple import two_sided_p_value
from tell_core.analysis.resampling import FloatArray, Resampling, interval

Censored = Literal["none", "above", "below", "undefined"]
Curve = Sequence[CurvePoint]

_BISECTIONS = 40  # locates a point inside a piece to 1e-12 of its length


class Bracket(NamedTuple):
    """Numbers known to lie in [lower, upper], row by row; shapes (R,)."""

    lower: FloatArray
    upper: FloatArray


@dataclass(frozen=True)
class Advantage:
    """Score of TELL minus score of the baseline at the same task budget; positive: TELL is better.

    For a metric where lower is better the difference is turned round.

    Attributes:
        difference: The difference, or None when the baseline was not run at this budget.
        low: Lower end of the interval; None: unbounded or undefined.
        high: Upper end of the interval; None: unbounded or undefined.
        p_value: Two-sided, from the draws of the interval; None where there is none.
    """

    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class LeverageEstimate:
    """The leverage ratio at one task budget against one baseline.

    Attributes:
        ratio: SFT task tokens / TELL task tokens at equal score; None when only a bound is known.
        low: Lower end of the interval; None: unbounded (down to 0) or undefined.
        high: Upper end of the interval; None: unbounded or undefined.
        confidence: Coverage of the interval.
        censored: above: SFT never reaches the score, the ratio is at least ``bound``; below: its
            smallest budget already reaches it, at most ``bound``; undefined: see ``reason``.
        reason: Why the ratio, or its interval, is missing.
        bound: The bound of a censored ratio.
        sft_equivalent_tokens: Task tokens SFT needs; of a bound, the most (fewest) measured.
        tell_score: Mean score of TELL.
        num_seeds: Seeds that all cells of the comparison have.
        num_items: Test items.
        advantage: The difference of scores at the same budget.
    """

    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    censored: Censored
    reason: str | None
    bound: float | None
    sft_equivalent_tokens: float | None
    tell_score: float | None
    num_seeds: int
    num_items: int
    advantage: Advantage

    def as_json(self) -> dict[str, Any]:
        """As it stands in leverage.json, where ``p_value`` is that of the advantage."""
        row = asdict(self)
        return row | {"p_value": row["advantage"].pop("p_value")}


def leverage_ratio(
    tell: CurvePoint,
    baselines: Sequence[Curve],
    resampling: Resampling,
    *,
    higher_is_better: bool = True,
) -> LeverageEstimate:
    """Leverage of ``tell`` against the curve of one baseline, or against the best of several.

    The best of several curves is their pointwise maximum, each counting where it was measured. It
    reaches a score where the first of them does, so in every draw its ratio is the smallest.

    Args:
        tell: TELL at one task budget.
        baselines: For each baseline its points at different task budgets, at least one.
        resampling: How the interval is made.
        higher_is_better: Direction of the metric.

    Returns:
        The estimate. It is "undefined", with a reason, when a score is missing, the metric is
        constant or all zero, a baseline has fewer than two budgets, or there is one seed; in the
        last case a point estimate is given where there is one, and no interval.
    """
    baselines = comparable(tell, baselines)
    seeds = common_seeds([tell, *(point for curve in baselines for point in curve)])
    tell = tell.select(seeds)
    curves = [[point.select(seeds) for point in curve] for curve in baselines]
    reason = _why_undefined(tell, curves)
    if reason is not None:
        return _undefined(tell, reason, resampling)
    sign = 1.0 if higher_is_better else -1.0
    needed = smallest([_needed(tell, curve, resampling, sign) for curve in curves])
    return _estimate(tell, needed, advantage(tell, curves, resampling, sign=sign), resampling)


def comparable(tell: CurvePoint, baselines: Sequence[Curve]) -> Sequence[Curve]:
    """The baselines' points that have every seed of ``tell``.

    An adaptive run gives some budgets fewer seeds than others. A baseline left with fewer than two
    budgets drops out; if all would, they stay as they are, and the seeds that all have decide.
    """
    kept = [
        [point for point in curve if set(tell.seeds) <= set(point.seeds)] for curve in baselines
    ]
    return [curve for curve in kept if len(curve) > 1] or baselines


def common_seeds(points: Iterable[CurvePoint]) -> tuple[int, ...]:
    """Seeds that every point has, rising."""
    return tuple(sorted(set.intersection(*(set(point.seeds) for point in points))))


def tokens_needed(task_tokens: FloatArray, scores: FloatArray, targets: FloatArray) -> Bracket:
    """Task tokens at which a curve first reaches a score.

    Args:
        task_tokens: Shape (K,), K >= 2, strictly rising. Task tokens of the measured budgets.
        scores: Shape (R, K). Scores there, higher is better.
        targets: Shape (R,). Scores to reach.

    Returns:
        Brackets in tokens; a row with a missing score is [0, inf].
    """
    fitted = isotonic(scores)
    log_tokens = np.log(task_tokens)
    is_reached = fitted >= targets[:, None]
    first = np.where(is_reached.any(axis=1), is_reached.argmax(axis=1), len(task_tokens))
    exact = np.exp(_crossing(log_tokens, fitted, targets, first))
    lower = np.where(first == len(task_tokens), task_tokens[-1], exact)
    upper = np.where(first == len(task_tokens), np.inf, exact)
    lower = np.where(first == 0, 0.0, lower)
    upper = np.where(first == 0, task_tokens[0], upper)
    is_missing = ~np.isfinite(scores).all(axis=1) | ~np.isfinite(targets)
    return Bracket(np.where(is_missing, 0.0, lower), np.where(is_missing, np.inf, upper))


def isotonic(scores: FloatArray) -> FloatArray:
    """Non-decreasing least-squares fit along axis 1, equal weights, shape (R, K).

    By the minimax formula: the largest over starts at or before, of the smallest over ends at or
    after, of the means between. Cubic in K, but without a loop over rows.
    """
    num_rows, num_budgets = scores.shape
    sums = np.concatenate([np.zeros((num_rows, 1)), np.cumsum(scores, axis=1)], axis=1)
    fitted = np.full(scores.shape, -np.inf)
    for start in range(num_budgets):
        means = (sums[:, start + 1 :] - sums[:, [start]]) / np.arange(1, num_budgets - start + 1)
        smallest_mean = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        fitted[:, start:] = np.maximum(fitted[:, start:], smallest_mean)
    return fitted


def smallest(brackets: Sequence[Bracket]) -> Bracket:
    """Where the first of several curves reaches a score, each counting where it was measured."""
    lower = np.stack([bracket.lower for bracket in brackets])
    upper = np.stack([bracket.upper for bracket in brackets])
    is_reached = np.isfinite(upper)
    reached_lower = np.where(is_reached, lower, np.inf).min(axis=0)
    return Bracket(
        np.where(is_reached.any(axis=0), reached_lower, lower.max(axis=0)), upper.min(axis=0)
    )


def advantage(
    tell: CurvePoint, curves: Sequence[Curve], resampling: Resampling, *, sign: float = 1.0
) -> Advantage:
    """Score difference to the best of the baselines at the same task budget.

    All points have the same seeds; with one seed there is no interval.
    """
    budget = tell.task_budget_tokens
    same = [point for curve in curves for point in curve if point.task_budget_tokens == budget]
    if not same:
        return Advantage()
    best = np.max([sign * point.rows(resampling) for point in same], axis=0)
    difference = sign * tell.rows(resampling) - best
    if len(tell.seeds) < 2:
        return Advantage(float(difference[0]))
    is_missing = np.isnan(difference)
    lower = np.where(is_missing, -np.inf, difference)[1:]
    upper = np.where(is_missing, np.inf, difference)[1:]
    ends = interval(lower, upper, resampling.confidence)
    return Advantage(float(difference[0]), *ends, two_sided_p_value(lower, upper))


def crossing(entries: Iterable[Mapping[str, Any]]) -> dict[str, int | None]:
    """Between which task budgets leverage falls from above 1 to below 1.

    Args:
        entries: Entries of leverage.json for one arm, general budget and baseline.

    Returns:
        ``largest_budget_above_one``: the largest task budget whose interval lies above 1;
        ``smallest_budget_below_one``: the smallest whose interval lies below 1. None: no such.
    """
    rows = list(entries)
    above = [row["task_budget_tokens"] for row in rows if row["low"] is not None and row["low"] > 1]
    below = [
        row["task_budget_tokens"] for row in rows if row["high"] is not None and row["high"] < 1
    ]
    return {
        "largest_budget_above_one": max(above, default=None),
        "smallest_budget_below_one": min(below, default=None),
    }


def _needed(tell: CurvePoint, curve: Curve, resampling: Resampling, sign: float) -> Bracket:
    """Tokens one baseline needs, as a ratio to those of TELL."""
    task_tokens, scores = _as_arrays(curve, resampling)
    needed = tokens_needed(task_tokens, sign * scores, sign * tell.rows(resampling))
    own = float(tell.task_tokens.mean())
    return Bracket(needed.lower / own, needed.upper / own)


def _as_arrays(curve: Curve, resampling: Resampling) -> tuple[FloatArray, FloatArray]:
    """Task tokens (K,) and scores (R, K); budgets that used up the pool alike are averaged."""
    used = np.asarray([point.task_tokens.mean() for point in curve])
    scores = np.stack([point.rows(resampling) for point in curve], axis=1)
    task_tokens, place = np.unique(used, return_inverse=True)
    share = place[:, None] == np.arange(len(task_tokens))
    return task_tokens, scores @ (share / share.sum(axis=0))


def _crossing(
    log_tokens: FloatArray, fitted: FloatArray, targets: FloatArray, first: FloatArray
) -> FloatArray:
    """Log tokens at which the piece that ends at budget ``first`` reaches its target, shape (R,).

    Rows with ``first`` 0 or K have no such piece; what they get is of no use.
    """
    right = np.clip(first, 1, len(log_tokens) - 1).astype(np.int64)
    left, row = right - 1, np.arange(len(fitted))
    slopes = _slopes(log_tokens, fitted)
    width = log_tokens[right] - log_tokens[left]
    ends = fitted[row, left], fitted[row, right]
    steepness = width * slopes[row, left], width * slopes[row, right]
    low, high = np.zeros(len(fitted)), np.ones(len(fitted))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_past = _hermite(middle, *ends, *steepness) >= targets
        low, high = np.where(is_past, low, middle), np.where(is_past, middle, high)
    return np.asarray(log_tokens[left] + high * width)


def _hermite(
    place: FloatArray, start: FloatArray, end: FloatArray, rise: FloatArray, fall: FloatArray
) -> FloatArray:
    """Cubic on [0, 1] with given values and slopes at both ends."""
    rest = 1 - place
    return np.asarray(
        start * (1 + 2 * place) * rest**2
        + rise * place * rest**2
        + end * place**2 * (1 + 2 * rest)
        - fall * place**2 * rest
    )


def _slopes(log_tokens: FloatArray, fitted: FloatArray) -> FloatArray:
    """Slopes at the budgets that keep the cubic pieces monotone, shape (R, K).

    Inside: harmonic mean of the neighbouring slopes, 0 beside a flat piece. At both ends: the
    three-point slope, at least 0 and at most three times that of the piece.
    """
    width = np.diff(log_tokens)
    secant = np.diff(fitted, axis=1) / width
    if len(width) == 1:
        return np.repeat(secant, 2, axis=1)
    before, after = secant[:, :-1], secant[:, 1:]
    weights = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    is_rising = (before > 0) & (after > 0)
    inverse = sum(
        weight / np.where(is_rising, slope, 1.0)
        for weight, slope in zip(weights, (before, after), strict=True)
    )
    inner = np.where(is_rising, sum(weights) / inverse, 0.0)
    first = _end_slope(width[0], width[1], secant[:, 0], secant[:, 1])
    last = _end_slope(width[-1], width[-2], secant[:, -1], secant[:, -2])
    return np.concatenate([first[:, None], inner, last[:, None]], axis=1)


def _end_slope(near: float, far: float, slope: FloatArray, next_slope: FloatArray) -> FloatArray:
    three_point = ((2 * near + far) * slope - near * next_slope) / (near + far)
    return np.clip(three_point, 0.0, 3 * slope)


def _estimate(
    tell: CurvePoint, needed: Bracket, gain: Advantage, resampling: Resampling
) -> LeverageEstimate:
    """Split the rows into the estimate and its draws; read off ratio or bound, and interval."""
    lower, upper = float(needed.lower[0]), float(needed.upper[0])
    censored: Censored = "above" if upper == np.inf else "below" if lower == 0 else "none"
    known = lower if censored == "above" else upper
    low, high = interval(needed.lower[1:], needed.upper[1:], resampling.confidence)
    estimate = LeverageEstimate(
        ratio=known if censored == "none" else None,
        low=low or None,
        high=high,
        confidence=resampling.confidence,
        censored=censored,
        reason=_REASONS[censored],
        bound=None if censored == "none" else known,
        sft_equivalent_tokens=known * float(tell.task_tokens.mean()),
        tell_score=float(tell.scores.mean()),
        num_seeds=len(tell.seeds),
        num_items=tell.num_items,
        advantage=gain,
    )
    return estimate if len(tell.seeds) > 1 else _without_interval(estimate)


def _without_interval(estimate: LeverageEstimate) -> LeverageEstimate:
    """An estimate from one seed: undefined, though a ratio inside the measured range is shown."""
    reason = ONE_SEED if estimate.reason is None else f"{ONE_SEED}; {estimate.reason}"
    tokens = None if estimate.ratio is None else estimate.sft_equivalent_tokens
    return replace(
        estimate,
        low=None,
        high=None,
        censored="undefined",
        reason=reason,
        bound=None,
        sft_equivalent_tokens=tokens,
    )


def _undefined(tell: CurvePoint, reason: str, resampling: Resampling) -> LeverageEstimate:
    score = float(tell.scores.mean()) if len(tell.seeds) else None
    return LeverageEstimate(
        ratio=None,
        low=None,
        high=None,
        confidence=resampling.confidence,
        censored="undefined",
        reason=reason,
        bound=None,
        sft_equivalent_tokens=None,
        tell_score=None if score is None else finite_or_none(score),
        num_seeds=len(tell.seeds),
        num_items=tell.num_items,
        advantage=Advantage(),
    )


def _why_undefined(tell: CurvePoint, curves: Sequence[Curve]) -> str | None:
    """Why there is nothing to estimate, or None."""
    if not tell.seeds:
        return "no seed was run for TELL and for every SFT budget"
    points = [point for curve in curves for point in curve]
    scores = np.stack([point.scores for point in (tell, *points)])
    if not np.isfinite(scores).all():
        return NO_SCORE
    if not tell.scores.any() and any(not point.scores.any() for point in points):
        return "all-zero scores: neither TELL nor SFT leaves the floor of the metric"
    if np.ptp(scores) == 0:
        return "the metric is constant: every training has the same score"
    if any(len({point.task_tokens.mean() for point in curve}) < 2 for curve in curves):
        return "SFT was run at fewer than two amounts of task tokens: it has no curve"
    return None


_REASONS: Mapping[Censored, str | None] = {
    "none": None,
    "above": "SFT does not reach TELL's score at its largest task budget",
    "below": "SFT reaches TELL's score at its smallest task budget already",
}
