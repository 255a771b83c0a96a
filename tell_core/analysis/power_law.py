"""Power law with offset, ``offset + amplitude * x ** -exponent``, by variable projection.

For a given exponent offset and amplitude are a linear least-squares problem, so the search is over
one number only.

The quantization model's own prediction is not the power law but a sum over finitely many quanta,
whose slope differs from the law's exponent by 0.07 to 0.25 at small scale; it is here too.

Shape letters: n points, D draws, E exponents, K quanta.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from tell_core.analysis.resampling import FloatArray, Resampling
from tell_core.errors import AnalysisError

MIN_EXPONENT, MAX_EXPONENT = 0.01, 6.0
_GRID = np.geomspace(MIN_EXPONENT, MAX_EXPONENT, 400)
_NUM_PARAMETERS = 3
_NUM_FINE = 2000
_NUM_NODES = 21  # of the Gauss-Hermite rule over the scatter

Profile = Callable[[Any], Any]


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted power law with offset.

    Attributes:
        offset: Value for x towards infinity.
        amplitude: Height above the offset at x = 1.
        exponent: How fast it falls, above 0.
        low: Lower end of the interval of the exponent; None: it runs to `MIN_EXPONENT`.
        high: Upper end; None: it runs to `MAX_EXPONENT`.
        confidence: Coverage of the interval.
        residual_sd: Standard deviation of the residuals, relative to the values if so weighted.
    """

    offset: float
    amplitude: float
    exponent: float
    low: float | None
    high: float | None
    confidence: float
    residual_sd: float

    def predict(self, x: FloatArray) -> FloatArray:
        """Values of the curve at ``x``."""
        return np.asarray(self.offset + self.amplitude * x**-self.exponent)


def power_law_fit(
    x: FloatArray,
    y: FloatArray,
    *,
    confidence: float = 0.95,
    has_relative_noise: bool = True,
    least_offset: float = -np.inf,
) -> PowerLawFit:
    """Fit a power law with offset, with a profile interval of its exponent.

    The interval holds every exponent whose best residual sum of squares stays below that of the
    fit times 1 + F / (n - 3), F the quantile of the F distribution with 1 and n - 3 degrees of
    freedom.

    Args:
        x: Shape (n,), n >= 4, above 0, at least four different values.
        y: Shape (n,). Values, above 0 with relative noise.
        confidence: Coverage of the interval.
        has_relative_noise: Whether the noise is proportional to the value (then residuals are
            divided by the fitted curve) or of one size everywhere.
        least_offset: The offset is at least this; a loss has one of at least 0.

    Raises:
        AnalysisError: Too few points, or values that are not finite or not above 0.
    """
    _check(x, y, has_relative_noise)
    scale = y if has_relative_noise else np.ones_like(y)
    exponent = _best_exponent(_profile(x, y, scale, least_offset))
    if has_relative_noise:
        offset, amplitude = _linear_part(x, y, scale, exponent, least_offset)
        fitted = offset + amplitude * x**-exponent
        scale = np.where(fitted > 0, fitted, y)
        exponent = _best_exponent(_profile(x, y, scale, least_offset))
    profile = _profile(x, y, scale, least_offset)
    offset, amplitude = _linear_part(x, y, scale, exponent, least_offset)
    freedom = len(x) - _NUM_PARAMETERS
    limit = profile(exponent) * (1 + stats.f.ppf(confidence, 1, freedom) / freedom)
    return PowerLawFit(
        offset=offset.item(),
        amplitude=amplitude.item(),
        exponent=exponent,
        low=_limit_crossing(profile, limit, exponent, MIN_EXPONENT),
        high=_limit_crossing(profile, limit, exponent, MAX_EXPONENT),
        confidence=confidence,
        residual_sd=float(np.sqrt(profile(exponent) / freedom)),
    )


class ExponentInterval(NamedTuple):
    """An interval of the exponent from a bootstrap.

    Attributes:
        low: Lower end.
        high: Upper end.
        draws: Shape (D,). Exponents of the resampled curves.
    """

    low: float
    high: float
    draws: FloatArray


def bootstrap_exponent(
    x: FloatArray, y: FloatArray, fit: PowerLawFit, resampling: Resampling
) -> ExponentInterval:
    """Interval of the exponent from residuals drawn anew around the fitted curve.

    Residuals are relative to the fitted values and enlarged by sqrt(n / (n - 3)), for the three
    fitted parameters make them too small. The spread of the log exponents is their standard error,
    and the interval takes the quantile of Student's t with n - 3 degrees of freedom: percentiles
    of the draws know nothing of how uncertain the noise itself is and cover 0.88 of 0.95 at 15
    points.

    Args:
        x: Shape (n,).
        y: Shape (n,). Values with noise proportional to them.
        fit: The fit of these points.
        resampling: Coverage, number and seed of the draws.
    """
    fitted = fit.predict(x)
    residuals = (y / fitted - 1) * np.sqrt(len(x) / (len(x) - _NUM_PARAMETERS))
    generator = np.random.default_rng(resampling.seed)
    chosen = generator.integers(len(x), size=(resampling.num_draws, len(x)))
    draws = _exponents(x, fitted * (1 + residuals[chosen]), fitted)
    quantile = stats.t.ppf((1 + resampling.confidence) / 2, len(x) - _NUM_PARAMETERS)
    reach = float(np.exp(quantile * np.log(draws).std(ddof=1)))
    return ExponentInterval(fit.exponent / reach, fit.exponent * reach, draws)


def _exponents(x: FloatArray, curves: FloatArray, scale: FloatArray) -> FloatArray:
    """Best exponent of each curve (D, n), on a fine grid, then at the vertex of a parabola."""
    grid = np.geomspace(MIN_EXPONENT, MAX_EXPONENT, _NUM_FINE)
    weights = scale**-2 / (scale**-2).sum()
    power = x ** -grid[:, None]
    centred = power - power @ weights[:, None]
    length = (weights * centred**2).sum(axis=1)
    explained = ((curves * weights) @ centred.T) ** 2 / length
    place = np.clip(explained.argmax(axis=1), 1, _NUM_FINE - 2)
    left, middle, right = (explained[np.arange(len(curves)), place + shift] for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, (left - right) / (2 * np.where(bend < 0, bend, -1.0)), 0.0)
    spacing = np.log(grid[1] / grid[0])
    return np.asarray(grid[place] * np.exp(np.clip(shift, -1, 1) * spacing))


def zipf_frequencies(num_quanta: int, alpha: float) -> FloatArray:
    """Use frequencies of K quanta, ``k ** -(alpha + 1)``, made to sum to 1; shape (K,)."""
    weights = np.arange(1, num_quanta + 1, dtype=np.float64) ** -(alpha + 1)
    return np.asarray(weights / weights.sum())


def quantum_loss(
    time: FloatArray,
    frequencies: FloatArray,
    learning_times: FloatArray,
    sharpness: float,
    scatter: float = 0.0,
) -> FloatArray:
    """Share of use whose quanta are not learned yet: the exact sum over finitely many quanta.

    Each quantum counts with its use frequency until it is learned; in between it falls as
    ``1 / (1 + (time / learning time) ** sharpness)``, half of it at the learning time.

    Args:
        time: Shape (n,), above 0.
        frequencies: Shape (K,).
        learning_times: Shape (K,), above 0; the medians, where there is scatter.
        sharpness: Of the single falls.
        scatter: Standard deviation of the logarithm of learning times around ``learning_times``;
            the expectation over it is taken.

    Returns:
        Shape (n,), 1 where nothing is learned.
    """
    nodes, shares = np.polynomial.hermite_e.hermegauss(_NUM_NODES)
    distance = np.log(time[:, None] / learning_times)
    falls = special.expit(-sharpness * (distance[..., None] - scatter * nodes))
    return np.asarray((falls @ (shares / shares.sum())) @ frequencies)


def log_slope(x: FloatArray, y: FloatArray) -> float:
    """Least-squares slope of log y over log x; both above 0."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _check(x: FloatArray, y: FloatArray, has_relative_noise: bool) -> None:
    if x.shape != y.shape or len(np.unique(x)) <= _NUM_PARAMETERS:
        raise AnalysisError(
            f"a power law with offset needs at least {_NUM_PARAMETERS + 1} different x, with one"
            f" value each; got x of shape {x.shape} and y of shape {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise AnalysisError("a power law needs finite numbers, and x above 0")
    if has_relative_noise and not (y > 0).all():
        raise AnalysisError("relative noise needs values above 0; use has_relative_noise=False")


def _profile(x: FloatArray, y: FloatArray, scale: FloatArray, least_offset: float) -> Profile:
    """Weighted residual sum of squares as a function of the exponent, one or many (E, 1)."""

    def residual_sum(exponent: Any) -> Any:
        offset, amplitude = _linear_part(x, y, scale, exponent, least_offset)
        residuals = (y - offset - amplitude * x**-exponent) / scale
        return (residuals**2).sum(axis=-1)

    return residual_sum


def _linear_part(
    x: FloatArray, y: FloatArray, scale: FloatArray, exponent: Any, least_offset: float
) -> tuple[Any, Any]:
    """Best offset, not below the least, and amplitude for an exponent, one or many (E, 1)."""
    power = x**-exponent
    weights = scale**-2 / (scale**-2).sum()
    centred = power - (weights * power).sum(axis=-1, keepdims=True)
    amplitude = (weights * centred * y).sum(axis=-1, keepdims=True) / (
        (weights * centred**2).sum(axis=-1, keepdims=True)
    )
    offset = (weights * (y - amplitude * power)).sum(axis=-1, keepdims=True)
    if not np.isfinite(least_offset):
        return offset, amplitude
    from_least = (weights * power * (y - least_offset)).sum(axis=-1, keepdims=True) / (
        (weights * power**2).sum(axis=-1, keepdims=True)
    )
    is_below = offset < least_offset
    return np.where(is_below, least_offset, offset), np.where(is_below, from_least, amplitude)


def _best_exponent(profile: Profile) -> float:
    place = int(np.argmin(profile(_GRID[:, None])))
    left, right = _GRID[max(place - 1, 0)], _GRID[min(place + 1, len(_GRID) - 1)]
    found = optimize.minimize_scalar(
        profile, bounds=(left, right), method="bounded", options={"xatol": 1e-9}
    )
    return float(found.x)


def _limit_crossing(profile: Profile, limit: float, exponent: float, end: float) -> float | None:
    """Where the profile rises above ``limit`` on the way from the exponent to ``end``."""
    if profile(end) <= limit:
        return None
    return float(optimize.brentq(lambda at: profile(at) - limit, exponent, end))
