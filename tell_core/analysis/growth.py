"""Curves of score against task tokens that rise: what a forecast is drawn from.

A curve is ``start + (ceiling - start) * h(n)``: the score at the smallest budget, the score it
tends to, and a shape h that rises from 0 there towards 1. There are three families of shapes in
the task tokens n, and the flat curve:

- power law with offset: 1 - h = (n_1 / n) ** a
- stretched exponential: 1 - h = exp((n_1 / t) ** k - (n / t) ** k)
- logistic in log n:     1 - h = (1 + (n_1 / m) ** k) / (1 + (n / m) ** k)

No real curve is one of these. The rise from each budget to the next therefore differs from that of
its curve by a random part, the *misfit*, in proportion to the rise; so does all of the rise beyond
the largest budget.

Seed noise may shrink towards the limits of the metric: its standard deviation is proportional to
the distance from them to the power 0, 1/2 or 1.

Shape letters: K budgets, M curves, T amounts of task tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tell_core.analysis.resampling import FloatArray

IntArray = npt.NDArray[np.int64]

POWER_LAW, EXPONENTIAL, LOGISTIC, FLAT = range(4)
_LEAST_NOISE = 0.005  # at a limit: this share of the noise far from it


class Limits(NamedTuple):
    """Lowest and highest score.

    Attributes:
        low: Lowest score there can be, or that is thought possible.
        high: Highest.
        has_low: Whether ``low`` is a limit of the metric.
        has_high: Whether ``high`` is.
    """

    low: float
    high: float
    has_low: bool
    has_high: bool

    @classmethod
    def of(cls, scores: FloatArray, limits: tuple[float, float]) -> "Limits":
        """Limits of the metric; where it has none, three times the measured span away."""
        span = float(np.ptp(scores))
        has_low, has_high = math.isfinite(limits[0]), math.isfinite(limits[1])
        return cls(
            limits[0] if has_low else float(scores.min()) - 3 * span,
            limits[1] if has_high else float(scores.max()) + 3 * span,
            has_low,
            has_high,
        )

    def noise(self, scores: FloatArray, power: FloatArray) -> FloatArray:
        """Noise at a score, relative to that farthest from the limits; broadcasts."""
        share = np.clip((scores - self.low) / (self.high - self.low), 0.0, 1.0)
        distance = np.ones_like(share)
        if self.has_low and self.has_high:
            distance = 2 * np.sqrt(share * (1 - share))
        elif self.has_low or self.has_high:
            distance = share if self.has_low else 1 - share
        return np.asarray(np.maximum(distance, _LEAST_NOISE) ** power)

    def clip(self, scores: FloatArray) -> FloatArray:
        """Scores inside the limits of the metric."""
        low = self.low if self.has_low else -math.inf
        return np.clip(scores, low, self.high if self.has_high else math.inf)


def _log_rest_of_exponential(first: FloatArray, further: FloatArray) -> FloatArray:
    """log(1 - h) where ``first`` is k log(n_1 / t), and ``further`` k log(n / n_1)."""
    return np.asarray(np.exp(np.minimum(first, 700)) - np.exp(np.minimum(first + further, 700)))


def _log_rest_of_logistic(first: FloatArray, further: FloatArray) -> FloatArray:
    """log(1 - h) where ``first`` is k log(n_1 / m), and ``further`` k log(n / n_1)."""
    return np.asarray(np.logaddexp(0, first) - np.logaddexp(0, first + further))


_LOG_RESTS: Mapping[int, Callable[[FloatArray, FloatArray], FloatArray]] = {
    POWER_LAW: lambda _, further: -further,
    EXPONENTIAL: _log_rest_of_exponential,
    LOGISTIC: _log_rest_of_logistic,
}


class Shapes(NamedTuple):
    """M shapes h.

    Attributes:
        family: Shape (M,). Which family.
        place: Shape (M,). t or m, in tokens; of no use to a power law.
        exponent: Shape (M,). a or k.
    """

    family: IntArray
    place: FloatArray
    exponent: FloatArray

    def rise(self, first_tokens: float, tokens: FloatArray) -> FloatArray:
        """h at ``tokens`` (T,), shape (M, T), where ``first_tokens`` is n_1; 0 when flat."""
        log_rest = np.zeros((len(self.family), len(tokens)))
        for family, formula in _LOG_RESTS.items():
            chosen = self.family == family
            power = self.exponent[chosen, None]
            first = power * np.log(first_tokens / self.place[chosen])[:, None]
            log_rest[chosen] = formula(first, power * np.log(tokens / first_tokens))
        return np.asarray(-np.expm1(log_rest))

    def select(self, index: IntArray) -> "Shapes":
        """The shapes at ``index``."""
        return Shapes(self.family[index], self.place[index], self.exponent[index])


@dataclass(frozen=True)
class GrowthCurves:
    """M equally probable curves.

    Attributes:
        tokens: Shape (K,). The budgets.
        shapes: Their shapes.
        start: Shape (M,). Score at the smallest budget.
        ceiling: Shape (M,). Score for n towards infinity.
        noise_sd: Shape (M,). Seed noise of one training, far from the limits.
        noise_power: Shape (M,). How it shrinks towards them.
        deviations: Shape (M, K). Misfit at the budgets.
        stretch: Shape (M,). Factor of the rise beyond the largest budget.
        limits: Of the score.
        effective_draws: How many independent draws the sample is worth.
    """

    tokens: FloatArray
    shapes: Shapes
    start: FloatArray
    ceiling: FloatArray
    noise_sd: FloatArray
    noise_power: FloatArray
    deviations: FloatArray
    stretch: FloatArray
    limits: Limits
    effective_draws: float

    def at(self, tokens: FloatArray) -> FloatArray:
        """Expected scores at ``tokens`` (T,), not below the smallest budget, shape (M, T)."""
        curve, last = self._family_curve(tokens), self._family_curve(self.tokens[-1:])
        beyond = np.maximum(curve - last, 0.0) * self.stretch[:, None]
        return self.limits.clip(np.minimum(curve, last) + beyond + self._misfit(tokens))

    def means(self, tokens: FloatArray, num_seeds: int, seed: int = 0) -> FloatArray:
        """Mean scores that another ``num_seeds`` trainings would show, shape (M, T)."""
        expected = self.at(tokens)
        spread = self.limits.noise(expected, self.noise_power[:, None]) * self.noise_sd[:, None]
        normal = np.random.default_rng([seed, 2]).standard_normal(expected.shape)
        return self.limits.clip(expected + normal * spread / math.sqrt(num_seeds))

    def _family_curve(self, tokens: FloatArray) -> FloatArray:
        rise = self.shapes.rise(self.tokens[0], tokens)
        return np.asarray(self.start[:, None] + (self.ceiling - self.start)[:, None] * rise)

    def _misfit(self, tokens: FloatArray) -> FloatArray:
        """Deviations, straight lines in log n between budgets and level beyond, shape (M, T)."""
        known = np.log(self.tokens)
        parts = np.clip(
            (np.log(tokens)[None, :] - known[:-1, None]) / np.diff(known)[:, None], 0.0, 1.0
        )
        return np.asarray(self.deviations[:, :1] + np.diff(self.deviations, axis=1) @ parts)
