"""Uncertainty from two sources at once: which items were tested, which seeds were trained.

Items are resampled with replacement, the same draw for every arm, budget and seed. Seeds are too
few for that (three seeds have ten distinct resamples, whose spread is a third too small): their
mean is drawn from its Student t distribution instead, jointly for all cells. The two deviations
add up.

Shape letters: D draws, S seeds, N items.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from tell_core.spec.model import AnalysisSpec

FloatArray = npt.NDArray[np.float64]


class Resampling(NamedTuple):
    """How intervals are made.

    Attributes:
        confidence: Coverage of the intervals, 0 to 1.
        num_draws: Number of draws.
        seed: Seed of the draws; equal seeds make results comparable draw by draw.
    """

    confidence: float = 0.95
    num_draws: int = 2000
    seed: int = 0

    @classmethod
    def of(cls, analysis: AnalysisSpec) -> "Resampling":
        """As the specification says."""
        return cls(analysis.confidence, analysis.bootstrap_draws, analysis.seed)


def item_weights(num_items: int, resampling: Resampling) -> FloatArray:
    """How often each item occurs in each draw of ``num_items`` items with replacement.

    Returns:
        Shape (D, N). Whole numbers; every row sums to N.
    """
    generator = np.random.default_rng([resampling.seed, num_items, 0])
    share = np.full(num_items, 1 / num_items)
    return generator.multinomial(num_items, share, resampling.num_draws).astype(np.float64)


@lru_cache(maxsize=8)
def seed_deviations(num_seeds: int, resampling: Resampling) -> FloatArray:
    """Weights whose sum over seed scores is a draw of (true mean - sample mean).

    For normal scores x (S,), ``weights @ x`` is distributed as t(S - 1) * sd(x) / sqrt(S), the
    posterior of the mean under a flat prior, and likewise for every linear contrast of several
    cells that share the seeds (multivariate t). An interval for the mean is then exact at any
    number of seeds from two.

    Args:
        num_seeds: S; a single seed has no spread, and its weights are 0.
        resampling: Number and seed of the draws.

    Returns:
        Shape (D, S), read-only: equal arguments share one array. Every row sums to 0.
    """
    deviations = np.zeros((resampling.num_draws, num_seeds))
    if num_seeds > 1:
        generator = np.random.default_rng([resampling.seed, num_seeds, 1])
        deviations += generator.standard_normal(deviations.shape)
        deviations -= deviations.mean(axis=1, keepdims=True)
        chi_square = generator.chisquare(num_seeds - 1, (resampling.num_draws, 1))
        deviations /= np.sqrt(num_seeds * chi_square)
    deviations.flags.writeable = False
    return deviations


def interval(
    lower: FloatArray, upper: FloatArray, confidence: float
) -> tuple[float | None, float | None]:
    """Central interval of draws that may themselves be known only to lie in [lower, upper].

    Args:
        lower: Shape (D,). Lower end of each draw; -inf where nothing is known.
        upper: Shape (D,). Upper end of each draw; inf where nothing is known.
        confidence: Coverage.

    Returns:
        Low and high; None where the end is infinite.
    """
    tail = (1 - confidence) / 2
    rank = math.floor(tail * (len(lower) - 1) + 1e-9)
    low, high = float(np.sort(lower)[rank]), float(np.sort(upper)[-1 - rank])
    return (low if np.isfinite(low) else None, high if np.isfinite(high) else None)


def student_interval(
    values: FloatArray, confidence: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over R trainings, (R, U) to (U,), with Student's interval; NaN ends where R is 1."""
    mean, num_trainings = values.mean(axis=0), len(values)
    if num_trainings < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    error = values.std(axis=0, ddof=1) / np.sqrt(num_trainings)
    width = stats.t.ppf((1 + confidence) / 2, num_trainings - 1) * error
    return mean, mean - width, mean + width
