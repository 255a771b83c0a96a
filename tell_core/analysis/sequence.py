"""The Q sequence: when each unit of a loss trace is learned, in which order, and what decides it.

A unit is a probe item, a token of one, or a subtask. It is learned at the first probe at which its
loss is at most half of its loss before training; the time in between is interpolated in
log(step + 1). A unit that is not learned by the last probe is censored there: it is known only
that it takes longer. A unit whose loss was at most `KNOWN_LOSS` before training has nothing to
learn and is left out.

Source of the theory: arXiv 2303.13506 (quanta are learned in the order of their use frequency, the
learning time proportional to frequency ** -beta).

Shape letters: U units, P probes, D draws, C clusters, Q coefficients, R trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from tell_core.analysis.resampling import FloatArray, student_interval
from tell_core.errors import AnalysisError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

KNOWN_LOSS = 0.1
"""Nats; the ceiling below which a token counts as learned (arXiv 2303.13506)."""
LEARNED_SHARE = 0.5
_MAX_NEWTON = 60
_NUM_STRATA = 3
_ORDER_COLUMNS = ("rank", "low", "high", "learned_share", "step", "step_low", "step_high")


@dataclass(frozen=True)
class LearningTimes:
    """When the units of one training are learned.

    Attributes:
        log_times: Shape (U,). Natural logarithm of step + 1 at which the unit is learned; of the
            last probe where it is not.
        probes: Shape (U,). Index of the first probe at which it is learned; P where it is not.
        is_learned: Shape (U,). False where the time is censored.
        was_known: Shape (U,). Whether there was nothing to learn.
        base_losses: Shape (U,). Loss before training, in nats.
    """

    log_times: FloatArray
    probes: IntArray
    is_learned: BoolArray
    was_known: BoolArray
    base_losses: FloatArray

    def select(self, units: BoolArray | IntArray) -> "LearningTimes":
        """The times of some of the units."""
        return LearningTimes(*(array[units] for array in vars(self).values()))


class RankAgreement(NamedTuple):
    """How far two learning orders agree.

    Attributes:
        kendall: Tau-b, -1 to 1.
        spearman: Rank correlation, -1 to 1.
        p_value: Of tau against no association.
        num_units: Units that had something to learn in both.
    """

    kendall: float
    spearman: float
    p_value: float
    num_units: int


class CensoredFit(NamedTuple):
    """A linear regression with right-censored outcomes and normal residuals.

    Attributes:
        coefficients: Shape (Q,).
        standard_errors: Shape (Q,). For independent observations.
        residual_sd: Standard deviation of the residuals.
    """

    coefficients: FloatArray
    standard_errors: FloatArray
    residual_sd: float


class LogRank(NamedTuple):
    """A log-rank test of two groups.

    Attributes:
        difference: Units of the group learned beyond those expected if the groups were alike;
            above 0: the group learns earlier.
        z: The difference in standard errors.
        p_value: Two-sided.
    """

    difference: float
    z: float
    p_value: float


def learning_times(
    steps: npt.NDArray[Any],
    losses: FloatArray,
    base_losses: FloatArray | None = None,
    *,
    is_for_good: bool = False,
) -> LearningTimes:
    """When the loss of each unit first is at most half of what it was before training.

    Args:
        steps: Shape (P,). Optimiser steps at the probes, rising.
        losses: Shape (P, U). Loss in nats.
        base_losses: Shape (U,). Loss before training; by default that of the first probe.
        is_for_good: Whether it has to stay so: not the first fall counts then, but the last.
    """
    base = losses[0] if base_losses is None else base_losses
    if is_for_good:
        losses = np.maximum.accumulate(losses[::-1], axis=0)[::-1]
    target = LEARNED_SHARE * base
    is_below = losses <= target
    is_learned = np.asarray(is_below.any(axis=0))
    probes = np.where(is_learned, is_below.argmax(axis=0), len(steps))
    time = np.log1p(np.asarray(steps, dtype=np.float64))
    after = np.minimum(probes, len(steps) - 1)
    before = np.maximum(after - 1, 0)
    units = np.arange(losses.shape[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        fall = losses[before, units] - losses[after, units]
        share = np.nan_to_num((losses[before, units] - target) / fall, nan=1.0)
    crossing = time[before] + np.clip(share, 0, 1) * (time[after] - time[before])
    return LearningTimes(
        log_times=np.where(is_learned, crossing, time[-1]),
        probes=probes.astype(np.int64),
        is_learned=is_learned,
        was_known=base <= KNOWN_LOSS,
        base_losses=np.asarray(base, dtype=np.float64),
    )


def ranks(times: LearningTimes) -> FloatArray:
    """Place of each unit in the learning order, from 1; those not learned share the last places."""
    key = np.where(times.is_learned, times.log_times, np.inf)
    return np.asarray(stats.rankdata(key))


def learning_order(
    trainings: Sequence[LearningTimes], confidence: float
) -> list[dict[str, float | None]]:
    """Mean place and time of each unit in the order of several trainings, with intervals.

    Units that were known before any of the trainings have no place and are not counted.

    Args:
        trainings: R trainings with the same units, such as the seeds of one arm.
        confidence: Coverage. The intervals are Student's, of the mean of R places and of R log
            times; with one training there are none.

    Returns:
        For each unit ``rank``, ``low`` and ``high`` (None with one training); ``learned_share``,
        the share of trainings in which it was learned; ``step``, the geometric mean of step + 1 at
        which it is learned, less 1, with ``step_low`` and ``step_high``. A training that does not
        learn it counts with its last step: ``step`` is then a lower bound and ``step_high`` None.
        All are None for a unit that was known.
    """
    had_to_learn = ~np.any([times.was_known for times in trainings], axis=0)
    unknown = [times.select(had_to_learn) for times in trainings]
    rows = iter(_places(unknown, confidence))
    none = dict.fromkeys(_ORDER_COLUMNS)
    return [next(rows) if is_placed else dict(none) for is_placed in had_to_learn]


def _places(trainings: Sequence[LearningTimes], confidence: float) -> list[dict[str, float | None]]:
    """The rows of `learning_order` for units that all had something to learn."""
    places = np.stack([ranks(times) for times in trainings])
    learned = np.stack([times.is_learned for times in trainings]).mean(axis=0)
    rank, low, high = student_interval(places, confidence)
    steps = student_interval(np.stack([times.log_times for times in trainings]), confidence)
    step, step_low, step_high = np.expm1(steps)
    columns = (
        rank,
        np.maximum(low, 1),
        np.minimum(high, places.shape[1]),
        learned,
        step,
        np.maximum(step_low, 0),
        np.where(learned < 1, np.nan, step_high),
    )
    return [
        {name: _known(value) for name, value in zip(_ORDER_COLUMNS, row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def rank_agreement(first: LearningTimes, second: LearningTimes) -> RankAgreement | None:
    """Kendall's tau-b and Spearman's correlation of two learning orders.

    Returns:
        None where fewer than three units had something to learn in both, or one order is all ties.
    """
    has_both = ~(first.was_known | second.was_known)
    left, right = ranks(first.select(has_both)), ranks(second.select(has_both))
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    tau, p_value = stats.kendalltau(left, right)
    spearman = stats.spearmanr(left, right).statistic
    return RankAgreement(float(tau), float(spearman), float(p_value), len(left))


def survival_curve(times: LearningTimes) -> dict[str, list[float]]:
    """Kaplan-Meier estimate of the share not yet learned.

    Returns:
        ``step`` and ``unlearned`` with ``standard_error``, at each time of learning.
    """
    from statsmodels.duration.survfunc import SurvfuncRight  # loads pandas: a second

    curve = SurvfuncRight(times.log_times, times.is_learned.astype(int))
    return {
        "step": np.expm1(curve.surv_times).tolist(),
        "unlearned": np.asarray(curve.surv_prob).tolist(),
        "standard_error": np.nan_to_num(curve.surv_prob_se).tolist(),
    }


def strata_of(base_losses: FloatArray, num_strata: int = _NUM_STRATA) -> IntArray:
    """Stratum of each unit by its loss before training: equally many units in each, shape (U,)."""
    bounds = np.quantile(base_losses, np.arange(1, num_strata) / num_strata)
    return np.searchsorted(bounds, base_losses, side="right").astype(np.int64)


def log_rank(
    times: LearningTimes,
    is_group: BoolArray,
    strata: IntArray,
    clusters: IntArray,
    *,
    num_draws: int = 500,
    seed: int = 0,
) -> LogRank:
    """Log-rank test of a group against the others, within strata, for clustered units.

    The times are the probes at which units are learned. Tokens of an item, and the same unit under
    several seeds, are not independent; the standard error therefore comes from drawing whole
    clusters with replacement, not from the test's own formula.

    Args:
        times: U observations.
        is_group: Shape (U,). Whether an observation belongs to the group.
        strata: Shape (U,). Compared are only observations of one stratum.
        clusters: Shape (U,). Which observations belong together.
        num_draws: Draws of clusters.
        seed: Seed of the draws.

    Raises:
        AnalysisError: One of the groups is empty.
    """
    if is_group.all() or not is_group.any():
        raise AnalysisError("a log-rank test needs observations of both groups, got one only")
    weights = cluster_weights(clusters, num_draws, seed)
    totals = np.zeros(num_draws + 1)
    for stratum in np.unique(strata):
        chosen = strata == stratum
        totals += _excess(times.select(chosen), is_group[chosen], weights[:, chosen])
    error = float(totals[1:].std(ddof=1))
    difference = float(totals[0])
    z = difference / error if error > 0 else 0.0
    return LogRank(difference, z, float(2 * stats.norm.sf(abs(z))))


def cluster_weights(clusters: IntArray, num_draws: int, seed: int) -> FloatArray:
    """How often each observation counts: once each in the first row, then in draws of clusters.

    Returns:
        Shape (D + 1, U).
    """
    _, place = np.unique(clusters, return_inverse=True)
    num_clusters = int(place.max()) + 1
    share = np.full(num_clusters, 1 / num_clusters)
    drawn = np.random.default_rng(seed).multinomial(num_clusters, share, num_draws)
    return np.concatenate([np.ones((1, len(place))), drawn[:, place]]).astype(np.float64)


def _excess(times: LearningTimes, is_group: BoolArray, weights: FloatArray) -> FloatArray:
    """Learned in the group beyond expectation, for each row of weights (D + 1, U)."""
    probes = np.unique(times.probes[times.is_learned])
    is_event = (times.probes[:, None] == probes) & times.is_learned[:, None]
    is_at_risk = (times.probes[:, None] >= probes).astype(np.float64)
    events, at_risk = weights @ is_event, weights @ is_at_risk
    grouped = weights * is_group
    group_events, group_at_risk = grouped @ is_event, grouped @ is_at_risk
    share = np.divide(group_at_risk, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
    return np.asarray((group_events - events * share).sum(axis=1))


def censored_regression(
    outcome: FloatArray,
    design: FloatArray,
    is_observed: BoolArray,
    weights: FloatArray | None = None,
) -> CensoredFit:
    """Regress a right-censored outcome on a design, by maximum likelihood with normal residuals.

    Newton's method on the concave form of the likelihood (Olsen 1978: coefficients and outcome
    divided by the residual standard deviation).

    Args:
        outcome: Shape (U,). The outcome, or where it is censored the value it exceeds.
        design: Shape (U, Q).
        is_observed: Shape (U,). False where censored.
        weights: Shape (U,). How often each observation counts; once by default.

    Raises:
        AnalysisError: Fewer outcomes observed than coefficients plus one, or coefficients that
            the design does not determine.
    """
    counts = np.ones(len(outcome)) if weights is None else weights
    if (is_observed & (counts > 0)).sum() <= design.shape[1]:
        raise AnalysisError(
            f"{int(is_observed.sum())} units were learned; a regression with {design.shape[1]}"
            f" coefficients needs at least {design.shape[1] + 1}"
        )
    signed = np.concatenate([-design, outcome[:, None]], axis=1)
    place = _start(outcome, design, counts)
    for _ in range(_MAX_NEWTON):
        gradient, curvature = _derivatives(place, signed, is_observed, counts)
        try:
            move = np.linalg.solve(curvature, gradient)
        except np.linalg.LinAlgError as error:
            raise AnalysisError("the design does not determine its coefficients") from error
        while place[-1] - move[-1] <= 0:
            move = move / 2
        place = place - move
        if np.abs(move).max() < 1e-10:
            break
    covariance = np.linalg.inv(-_derivatives(place, signed, is_observed, counts)[1])
    scale = place[-1]
    coefficients = place[:-1] / scale
    # Coefficients are a ratio of what was fitted: their errors by the delta method.
    jacobian = np.concatenate([np.eye(len(coefficients)), -coefficients[:, None]], axis=1) / scale
    errors = np.sqrt(np.diag(jacobian @ covariance @ jacobian.T))
    return CensoredFit(coefficients, errors, float(1 / scale))


def _start(outcome: FloatArray, design: FloatArray, counts: FloatArray) -> FloatArray:
    """The least-squares fit as if nothing were censored, in Olsen's form."""
    root = np.sqrt(counts)
    coefficients, *_ = np.linalg.lstsq(design * root[:, None], outcome * root, rcond=None)
    residuals = (outcome - design @ coefficients) * root
    scale = 1 / max(float(np.sqrt((residuals**2).sum() / counts.sum())), 1e-6)
    return np.append(coefficients * scale, scale)


def _derivatives(
    place: FloatArray, signed: FloatArray, is_observed: BoolArray, counts: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Gradient (Q + 1,) and second derivatives of the log-likelihood."""
    residuals = signed @ place
    # Inverse Mills ratio of the normal distribution, stable far out in its tail.
    log_density = -(residuals**2) / 2 - np.log(2 * np.pi) / 2
    mills = np.exp(log_density - special.log_ndtr(-residuals))
    slope = np.where(is_observed, residuals, mills)
    bend = np.where(is_observed, 1.0, mills * (mills - residuals))
    gradient = -(counts * slope) @ signed
    curvature = -(signed * (counts * bend)[:, None]).T @ signed
    num_observed = counts[is_observed].sum()
    gradient[-1] += num_observed / place[-1]
    curvature[-1, -1] -= num_observed / place[-1] ** 2
    return gradient, curvature


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
