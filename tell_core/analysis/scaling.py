"""Scaling of a measured curve: is it a power law with offset, and with which exponent?

Five curves are compared on the mean over seeds, residuals relative to the loss, by AICc with the
noise as a parameter (the exponential stands beside the law because it falls to an offset too, the
logistic because a training begins with a plateau):

- flat (2 parameters);
- log-linear, ``a - b log x`` (3);
- exponential, ``a + b exp(-x / t)`` (4);
- power law with offset, ``a + b x ** -c`` (4);
- logistic in log x, ``a + b / (1 + (x / m) ** c)`` (5), m between the second and the last but one
  point.

All must fall, and no level that one falls to is below 0, where no loss can be. A power law is
claimed only where it leads all others by 4, over at least two seeds, with an interval of its
exponent that ends inside the search.

That interval is the wider of two at either end. Over seeds, the units of repetition: each seed's
own exponent, and Student's interval of the mean of their logarithms around the exponent of the mean
curve. Over residuals of the mean curve: the profile interval of `power_law_fit`, which sees what
all seeds deviate in alike.

Shape letters: S seeds, n points, M candidates of a curve's parameters, Q of these parameters,
K quanta, U units, P probes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from tell_core.analysis.curves import ONE_SEED
from tell_core.analysis.power_law import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    PowerLawFit,
    log_slope,
    power_law_fit,
    quantum_loss,
)
from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.sequence import LearningTimes, censored_regression
from tell_core.analysis.shapes import fit_sigmoid
from tell_core.errors import AnalysisError

Status = Literal["power law", "another curve", "undetermined"]
Basis = Callable[[FloatArray, FloatArray], FloatArray]

MIN_POINTS = 8
MIN_LEAD = 4.0
MIN_QUANTA = 8
POWER_LAW = "power law"
_FLAT = "flat"
_LEAST_NOISE = 1e-3  # of a loss: curves that differ by less are not told apart
_MAX_STEP_WIDTH = 0.4
_NUM_REFINEMENTS = 8
_AT_END = 1.02
NOT_FALLING = "it does not fall by more than its noise"
_TURNING = "it turns round within the range"


@dataclass(frozen=True)
class ScalingFit:
    """What a curve says of its scaling.

    Attributes:
        status: Whether it is a power law, better described by another curve, or undetermined.
        reason: Why it is not a power law, else None.
        best: The curve with the lowest AICc, or None where none was fitted.
        delta_aicc: AICc of each curve above the lowest.
        exponent: Of the power law with offset, whether it is claimed or not; above 0.
        low: Lower end of its interval; None: unknown, or at the end of the search.
        high: Upper end.
        offset: Loss for x towards infinity, at least 0.
        amplitude: Loss above the offset at x = 1.
        num_points: n.
        num_seeds: S.
    """

    status: Status
    reason: str | None
    best: str | None
    delta_aicc: Mapping[str, float]
    exponent: float | None
    low: float | None
    high: float | None
    offset: float | None
    amplitude: float | None
    num_points: int
    num_seeds: int


def fit_scaling(x: FloatArray, losses: FloatArray, confidence: float = 0.95) -> ScalingFit:
    """Compare the curves, fit the power law with offset, and say what may be claimed.

    Args:
        x: Shape (n,), above 0, rising. Steps or tokens.
        losses: Shape (S, n). Loss of each seed.
        confidence: Coverage of the interval of the exponent.

    Raises:
        AnalysisError: Shapes do not fit, or x is not rising from above 0.
    """
    _check(x, losses)
    if (reason := _why_unfitted(losses)) is not None:
        return _unfitted(reason, losses)
    mean = losses.mean(axis=0)
    scores, turning = _compared(x, mean)
    lowest = min(scores.values())
    best = min(scores, key=lambda name: scores[name])
    deltas = {name: score - lowest for name, score in scores.items()}
    is_turning = turning - lowest <= -MIN_LEAD
    if is_turning or deltas[_FLAT] < MIN_LEAD:
        fit = _unfitted(_TURNING if is_turning else NOT_FALLING, losses)
        return replace(fit, best=best, delta_aicc=deltas)
    law = power_law_fit(x, mean, confidence=confidence, least_offset=0.0)
    low, high = _interval(x, losses, law, confidence)
    status, reason = _claim(deltas, low, high, len(losses))
    return ScalingFit(
        status, reason, best, deltas, law.exponent, low, high, law.offset, law.amplitude,
        len(x), len(losses),
    )  # fmt: skip


def on_common_scale(
    curves: Sequence[tuple[FloatArray, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """Curves of several seeds at the same x, for their trainings differ by a few steps.

    Args:
        curves: S pairs of x, rising from above 0, and of a value above 0 at each.

    Returns:
        x of the curve with the fewest points, cut to the range that all have, shape (n,), and the
        values there, straight in logarithms between points, shape (S, n).
    """
    shortest = min((x for x, _ in curves), key=len)
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.clip(shortest, low, high))
    with np.errstate(divide="ignore", invalid="ignore"):  # a loss of 0 is refused by the fit
        rows = [np.exp(np.interp(np.log(grid), np.log(x), np.log(y))) for x, y in curves]
    return grid, np.stack(rows)


def _check(x: FloatArray, losses: FloatArray) -> None:
    if losses.ndim != 2 or losses.shape[1:] != x.shape or not len(losses):
        raise AnalysisError(
            f"a scaling curve needs a loss of every seed at every point; got x of shape {x.shape}"
            f" and losses of shape {losses.shape}"
        )
    if not (np.isfinite(x).all() and (x > 0).all() and (np.diff(x) > 0).all()):
        raise AnalysisError("a scaling curve needs x that rises from above 0")


def _why_unfitted(losses: FloatArray) -> str | None:
    if (num_points := losses.shape[1]) < MIN_POINTS:
        return f"it has {num_points} points; at least {MIN_POINTS} are needed"
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        return "a loss is not a finite number above 0"
    return None


def _unfitted(reason: str, losses: FloatArray) -> ScalingFit:
    num_seeds, num_points = losses.shape
    return ScalingFit(
        "undetermined", reason, None, {}, None, None, None, None, None, num_points, num_seeds
    )


def _claim(
    deltas: Mapping[str, float], low: float | None, high: float | None, num_seeds: int
) -> tuple[Status, str | None]:
    """The status, and what stands against a power law."""
    rival = min((name for name in deltas if name != POWER_LAW), key=lambda name: deltas[name])
    lead = deltas[rival] - deltas[POWER_LAW]
    if lead <= -MIN_LEAD:
        return "another curve", f"the {rival} curve describes it better, by {-lead:.1f} in AICc"
    against = []
    if lead < MIN_LEAD:
        against.append(f"the {rival} curve is as good: AICc differs by {abs(lead):.1f}")
    if num_seeds < 2:
        against.append(ONE_SEED)
    elif low is None or high is None:
        ends = [f"{MIN_EXPONENT:g}"] * (low is None) + [f"{MAX_EXPONENT:g}"] * (high is None)
        against.append(
            f"the interval of its exponent runs to the end of the search ({' and '.join(ends)})"
        )
    return ("undetermined", "; ".join(against)) if against else ("power law", None)


def _interval(
    x: FloatArray, losses: FloatArray, law: PowerLawFit, confidence: float
) -> tuple[float | None, float | None]:
    """The wider of the intervals over seeds and over residuals, at either end."""
    if (num_seeds := len(losses)) < 2:
        return None, None
    fits = [power_law_fit(x, row, least_offset=0.0) for row in losses]
    exponents = np.array([fit.exponent for fit in fits])
    quantile = stats.t.ppf((1 + confidence) / 2, num_seeds - 1)
    reach = float(np.exp(quantile * np.log(exponents).std(ddof=1) / np.sqrt(num_seeds)))
    low, high = law.exponent / reach, law.exponent * reach
    is_open_below = law.low is None or min(low, exponents.min()) < MIN_EXPONENT * _AT_END
    is_open_above = law.high is None or max(high, exponents.max()) > MAX_EXPONENT / _AT_END
    return (
        None if is_open_below or law.low is None else min(low, law.low),
        None if is_open_above or law.high is None else max(high, law.high),
    )


def _exponential(x: FloatArray, parameters: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-x * np.exp(-parameters)))


def _power(x: FloatArray, parameters: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-np.exp(parameters) * np.log(x)))


def _logistic(x: FloatArray, parameters: FloatArray) -> FloatArray:
    distance = np.exp(parameters[:, 1:]) * (np.log(x) - parameters[:, :1])
    return np.asarray(1 / (1 + np.exp(np.clip(distance, -50, 50))))


def _compared(x: FloatArray, y: FloatArray) -> tuple[dict[str, float], float]:
    """AICc of every curve, and of a parabola in log x that turns round inside the range."""
    log_x, ends = np.log(x), (np.log(x[1]), np.log(x[-2]))
    exponents = np.linspace(np.log(MIN_EXPONENT), np.log(MAX_EXPONENT), 96)
    times = np.linspace(log_x[0] - 2, log_x[-1] + 2, 96)
    place = [np.linspace(*ends, 40), np.linspace(np.log(0.1), np.log(12.0), 24)]
    sums = {
        _FLAT: (_residual_sums(np.zeros((1, len(x))), y)[0], 2),
        "log-linear": (_residual_sums(-log_x[None], y, has_level=False)[0], 3),
        "exponential": (_least_sum(x, y, _exponential, [times]), 4),
        POWER_LAW: (_least_sum(x, y, _power, [exponents]), 4),
        "logistic": (_least_sum(x, y, _logistic, place), 5),
    }
    scores = {name: _aicc(total, len(x), count) for name, (total, count) in sums.items()}
    return scores, _aicc(_turning_sum(log_x, y), len(x), 4)


def _aicc(residual_sum: float, num_points: int, num_parameters: int) -> float:
    variance = max(residual_sum / num_points, _LEAST_NOISE**2)
    correction = num_parameters * (num_parameters + 1) / (num_points - num_parameters - 1)
    return float(num_points * np.log(variance) + 2 * (num_parameters + correction))


def _residual_sums(bases: FloatArray, y: FloatArray, *, has_level: bool = True) -> FloatArray:
    """Least sum of squared relative residuals of ``a + b * basis``, b >= 0.

    Bases (M, n) to sums (M,). Where a is the level that the curve falls to, a >= 0; bases are then
    not negative, and at a = 0 neither is b.
    """
    weights = y**-2 / (y**-2).sum()
    centred = bases - (bases * weights).sum(axis=1, keepdims=True)
    rest = y - (weights * y).sum()
    length = (weights * centred**2).sum(axis=1)
    rise = (weights * centred * rest).sum(axis=1) / np.where(length > 0, length, 1.0)
    fall = np.maximum(rise, 0.0)
    sums = (weights * rest**2).sum() - fall**2 * length
    if has_level:
        level = (weights * (y - fall[:, None] * bases)).sum(axis=1)
        square = (weights * bases**2).sum(axis=1)
        product = (weights * bases * y).sum(axis=1)
        without = (weights * y**2).sum() - product**2 / np.where(square > 0, square, 1.0)
        sums = np.where(level < 0, without, sums)
    return np.asarray(np.maximum(sums, 0.0) * (y**-2).sum())


def _least_sum(x: FloatArray, y: FloatArray, basis: Basis, axes: Sequence[FloatArray]) -> float:
    """Search a grid, then three places per axis around its best, ever closer."""
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    lowest, highest = grid.min(axis=0), grid.max(axis=0)
    spacing = np.array([axis[1] - axis[0] for axis in axes])
    around = np.stack(np.meshgrid(*([[-1.0, 0.0, 1.0]] * len(axes))), axis=-1)
    moves = around.reshape(-1, len(axes)) * spacing
    sums = _residual_sums(basis(x, grid), y)
    for level in range(1, _NUM_REFINEMENTS + 1):
        near = grid[sums.argmin()] + moves / 2**level
        grid = np.clip(near, lowest, highest)
        sums = _residual_sums(basis(x, grid), y)
    return float(sums.min())


def _turning_sum(log_x: FloatArray, y: FloatArray) -> float:
    """Residual sum of a parabola whose lowest point lies inside; infinite where it does not."""
    design = np.stack([np.ones_like(log_x), log_x, log_x**2], axis=1) / y[:, None]
    coefficients, *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    _, slope, bend = coefficients
    if bend <= 0 or not log_x[1] < -slope / (2 * bend) < log_x[-2]:
        return float("inf")
    return float(((1 - design @ coefficients) ** 2).sum())


class FiniteK(NamedTuple):
    """The slope that finitely many quanta predict, beside that of the mean loss.

    Attributes:
        beta: Exponent of learning time on use frequency.
        sharpness: Median of the falls of the units learned.
        scatter: Standard deviation of log learning times around their regression.
        slope: Of log mean loss on log x, from the first unit learned to the end.
        predicted_slope: The same of the sum over the K quanta.
        x: Shape (n,). That range.
        predicted: Shape (n,). The sum: share of use whose quanta are not learned yet.
    """

    beta: float
    sharpness: float
    scatter: float
    slope: float
    predicted_slope: float
    x: FloatArray
    predicted: FloatArray


def finite_k(
    x: FloatArray,
    losses: FloatArray,
    times: LearningTimes,
    use: FloatArray,
    frequencies: FloatArray,
    mean_loss: FloatArray,
) -> FiniteK:
    """Predict the slope of the mean loss from the use of K quanta and when units are learned.

    The prediction knows the use frequencies, and takes from the units the censored regression of
    log learning time on log use, the scatter around it, and the median sharpness of the single
    falls; it does not know the mean loss.

    Args:
        x: Shape (P,). Steps at the probes, in the unit of the learning times, above 0.
        losses: Shape (P, U). Loss of each unit.
        times: When each of the U units is learned.
        use: Shape (U,). Use frequency of each unit's quantum.
        frequencies: Shape (K,). Of all quanta, in the unit of ``use``; they need not sum to 1.
        mean_loss: Shape (P,). What is predicted.

    Raises:
        AnalysisError: Too few units are learned, all are used alike, or fewer than three probes
            lie after the first that is learned.
    """
    if np.ptp(np.log(use)) < _LEAST_NOISE:
        raise AnalysisError("all units are used alike: use says nothing of when they are learned")
    learned = np.flatnonzero(times.is_learned)
    design = np.stack([np.ones_like(use), np.log(use)], axis=1)
    fit = censored_regression(times.log_times, design, times.is_learned)
    window = np.log(x) >= times.log_times[learned].min()
    if window.sum() < 3:
        raise AnalysisError(
            f"{int(window.sum())} probes lie after the first unit learned; a slope needs 3"
        )
    falls = fit_sigmoid(np.log(x), losses[:, learned].T, "down", _MAX_STEP_WIDTH)
    sharpness = float(np.median(falls.parameters[:, 1]))
    medians = np.exp(fit.coefficients[0] + fit.coefficients[1] * np.log(frequencies))
    shares = frequencies / frequencies.sum()
    predicted = quantum_loss(x[window], shares, medians, sharpness, fit.residual_sd)
    return FiniteK(
        beta=-float(fit.coefficients[1]),
        sharpness=sharpness,
        scatter=fit.residual_sd,
        slope=log_slope(x[window], mean_loss[window]),
        predicted_slope=log_slope(x[window], predicted),
        x=x[window],
        predicted=predicted,
    )


def asymptotic_slope(alpha: float, beta: float) -> float | None:
    """What infinitely many quanta would give, ``-alpha / (beta (1 + alpha))``; None without a beta.

    At small scale the slope of finitely many lies 0.07 to 0.25 away from it.
    """
    return -alpha / (beta * (1 + alpha)) if beta > 0 else None


class ZipfFit(NamedTuple):
    """Use frequencies as a power law of their rank, ``rank ** -(alpha + 1)``.

    Attributes:
        alpha: Exponent minus 1; None where none can be stated.
        reason: Why not, else None.
    """

    alpha: float | None
    reason: str | None


def zipf_fit(frequencies: FloatArray) -> ZipfFit:
    """Fit log frequency over log rank; refused where frequencies fall as well exponentially.

    Args:
        frequencies: Shape (K,), above 0, in any order.
    """
    if (num_quanta := len(frequencies)) < MIN_QUANTA:
        return ZipfFit(None, f"{num_quanta} skills; at least {MIN_QUANTA} are needed for their law")
    log_p = np.log(np.sort(frequencies)[::-1])
    rank = np.arange(1, num_quanta + 1, dtype=np.float64)
    lines = [np.polyfit(place, log_p, 1) for place in (np.log(rank), rank)]
    power, exponential = (
        max(float(((log_p - np.polyval(line, place)) ** 2).mean()), _LEAST_NOISE**2)
        for line, place in zip(lines, (np.log(rank), rank), strict=True)
    )
    lead = num_quanta * np.log(exponential / power)  # in AICc: both have three parameters
    alpha = -float(lines[0][0]) - 1
    if lead < MIN_LEAD:
        return ZipfFit(None, "use falls with rank exponentially as well as by a power")
    if alpha <= 0:
        return ZipfFit(
            None, f"use falls by the power {alpha + 1:.2f} of rank; the law needs above 1"
        )
    return ZipfFit(alpha, None)
