"""Rising curves drawn from their posterior, given the scores of a few seeds at a few budgets.

The families of `growth` are averaged by their marginal likelihood (Hoeting et al. 1999). Priors
are weak: the places of a curve are uniform in logs, its exponents in square roots, over what the
budgets could tell apart; start and ceiling are uniform between the limits of the metric, the
ceiling above the start, or, as likely, the ceiling is the limit; the noise variance is inverse
gamma, worth one observation.

The sample is made by importance sampling. Shapes are drawn from the prior, the noise from what the
seeds at one budget show, start and ceiling from their exact truncated normal, and each draw is
weighed by the likelihood that is left. Two further rounds draw shapes where the weight was found
(as VEGAS does: Lepage 1978), and stay exact. Nothing is optimised, so nothing gets stuck, and
equal inputs give equal curves.

Shape letters: K budgets, S seeds, M draws.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from tell_core.analysis.growth import FLAT, GrowthCurves, IntArray, Limits, Shapes
from tell_core.analysis.leverage import isotonic
from tell_core.analysis.resampling import FloatArray

BoolArray = npt.NDArray[np.bool_]

_PRIOR_SHARES = np.array([0.33, 0.33, 0.32, 0.02])
_EXPONENTS = np.array([(0.02, 3.0), (0.1, 4.0), (0.1, 10.0), (1.0, 1.0)])  # by family
_REACH = (4.0, 8.0)  # t and m lie up to these factors below and above the budgets
_CAPPED_SHARE = 0.5  # of the curves tend to the limit of the metric, where it has one
_NOISE_POWERS = np.array([0.0, 0.5, 1.0])
_MISFITS = np.array([0.1, 0.2, 0.3])  # standard deviation, as a share of the rise
_LEAST_RISE = 0.1  # between two budgets, for the misfit: this share of the range per step
_PRIOR_NOISE = 0.05  # expected before looking: this share of the measured range
_NUM_PROPOSALS, _NUM_ROUNDS = 6000, 3
_NUM_STRIPS = 16  # into which the range of each shape parameter is divided
_KEPT_SHARE = 0.2  # of the proposals of a later round are drawn from the prior still
_TINY = 1e-300


class _Problem(NamedTuple):
    """What is known.

    Attributes:
        tokens: Shape (K,). The budgets.
        scores: Shape (S, K).
        means: Shape (K,). Over seeds.
        limits: Of the score.
    """

    tokens: FloatArray
    scores: FloatArray
    means: FloatArray
    limits: Limits


class _Proposals(NamedTuple):
    """M draws of what is not integrated out.

    Attributes:
        shapes: M shapes.
        is_capped: Shape (M,). Whether the curve tends to the limit of the metric.
        noise_power: Shape (M,).
        misfit: Shape (M,).
        uniform: Shape (M, 3). What noise, ceiling and start are drawn with.
        bins: Shape (M,). Bin of the plan that each was drawn from.
        log_prior: Shape (M,). Log of the prior density over that of the plan.
    """

    shapes: Shapes
    is_capped: BoolArray
    noise_power: FloatArray
    misfit: FloatArray
    uniform: FloatArray
    bins: IntArray
    log_prior: FloatArray


class _Weighed(NamedTuple):
    """Proposals with the rest drawn.

    Attributes:
        start: Shape (M,).
        ceiling: Shape (M,).
        variance: Shape (M,). Of the seed noise.
        misfit: Shape (M, K, K). Covariance of the misfit at the budgets.
        noise: Shape (M, K). Variance of the means' seed noise.
        rise: Shape (M, K). h at the budgets.
        log_weight: Shape (M,).
    """

    start: FloatArray
    ceiling: FloatArray
    variance: FloatArray
    misfit: FloatArray
    noise: FloatArray
    rise: FloatArray
    log_weight: FloatArray


class _Lines(NamedTuple):
    """Start and ceiling of each draw, and the log of the likelihood without them, all (M,)."""

    start: FloatArray
    ceiling: FloatArray
    log_likelihood: FloatArray


def grow(
    tokens: FloatArray,
    scores: FloatArray,
    limits: tuple[float, float],
    *,
    num_draws: int = 4000,
    seed: int = 0,
) -> GrowthCurves:
    """Curves through the scores of S seeds at K budgets; higher is better.

    Args:
        tokens: Shape (K,), K >= 2, strictly rising, above 0.
        scores: Shape (S, K), S >= 2, finite, not all the same.
        limits: Lowest and highest score there can be; infinite where there is none.
        num_draws: M.
        seed: Seed of the draws.
    """
    problem = _Problem(tokens, scores, scores.mean(axis=0), Limits.of(scores, limits))
    generator = np.random.default_rng([seed, 1])
    plan = _prior_plan()
    for _ in range(_NUM_ROUNDS):
        drawn = _propose(tokens, plan, generator)
        weighed = _weigh(problem, drawn)
        plan = _refined(plan, drawn, weighed.log_weight)
    return _sample(problem, drawn, weighed, num_draws, generator)


def _sample(
    problem: _Problem,
    drawn: _Proposals,
    weighed: _Weighed,
    num_draws: int,
    generator: np.random.Generator,
) -> GrowthCurves:
    """Equally probable curves out of weighted ones."""
    chosen, effective = _resample(weighed.log_weight, num_draws)
    start, ceiling = weighed.start[chosen], weighed.ceiling[chosen]
    fitted = start[:, None] + (ceiling - start)[:, None] * weighed.rise[chosen]
    misfit, noise, share = weighed.misfit[chosen], weighed.noise[chosen], drawn.misfit[chosen]
    return GrowthCurves(
        tokens=problem.tokens,
        shapes=drawn.shapes.select(chosen),
        start=start,
        ceiling=ceiling,
        noise_sd=np.sqrt(weighed.variance[chosen]),
        noise_power=drawn.noise_power[chosen],
        deviations=_deviations(problem.means - fitted, misfit, noise, generator),
        stretch=np.exp(share * generator.standard_normal(num_draws) - share**2 / 2),
        limits=problem.limits,
        effective_draws=effective,
    )


def _prior_plan() -> FloatArray:
    """Prior probability of each bin: squares of two shape parameters per family, shape (bins,)."""
    squares = _NUM_STRIPS**2
    return np.repeat(_PRIOR_SHARES / squares, squares)


def _propose(tokens: FloatArray, plan: FloatArray, generator: np.random.Generator) -> _Proposals:
    """Draws from a plan: bins in proportion to their probability, uniform inside each."""
    bins, _ = _resample(np.log(np.maximum(plan, _TINY)), _NUM_PROPOSALS)
    family, square = np.divmod(bins, _NUM_STRIPS**2)
    corner = np.stack(np.divmod(square, _NUM_STRIPS), axis=1)
    uniform = generator.random((_NUM_PROPOSALS, 8)).clip(1e-9, 1 - 1e-9)
    first, second = ((corner + uniform[:, :2]) / _NUM_STRIPS).T
    nearest, farthest = tokens[0] / _REACH[0], tokens[-1] * _REACH[1]
    least, most = np.sqrt(_EXPONENTS)[family].T
    return _Proposals(
        Shapes(
            family,
            nearest * (farthest / nearest) ** first,
            (least + (most - least) * second) ** 2,
        ),
        uniform[:, 2] < _CAPPED_SHARE,
        _NOISE_POWERS[(uniform[:, 3] * len(_NOISE_POWERS)).astype(np.int64)],
        _MISFITS[(uniform[:, 4] * len(_MISFITS)).astype(np.int64)],
        uniform[:, 5:],
        bins,
        np.log(_prior_plan()[bins] / plan[bins]),
    )


def _refined(plan: FloatArray, drawn: _Proposals, log_weight: FloatArray) -> FloatArray:
    """The plan of the next round: most draws where the weight of this one lies."""
    weight = np.exp(log_weight - log_weight.max())
    found = np.bincount(drawn.bins, weight, len(plan)) / weight.sum()
    return np.asarray(_KEPT_SHARE * _prior_plan() + (1 - _KEPT_SHARE) * found)


def _weigh(problem: _Problem, drawn: _Proposals) -> _Weighed:
    """Draw noise, ceiling and start of every proposal, and weigh it by the likelihood left."""
    means, num_seeds = problem.means, len(problem.scores)
    relative_noise = problem.limits.noise(means, drawn.noise_power[:, None])
    variance, evidence = _noise_variance(problem.scores, relative_noise, drawn.uniform[:, 0])
    noise = variance[:, None] * relative_noise**2 / num_seeds
    misfit = drawn.misfit[:, None, None] ** 2 * _misfit_covariance(problem.scores)
    rise = drawn.shapes.rise(problem.tokens[0], problem.tokens)
    covariance = misfit + noise[:, :, None] * np.eye(len(means))
    lines = _lines(rise, means, covariance, drawn, problem.limits)
    log_weight = evidence + lines.log_likelihood + drawn.log_prior
    return _Weighed(lines.start, lines.ceiling, variance, misfit, noise, rise, log_weight)


def _noise_variance(
    scores: FloatArray, relative_noise: FloatArray, uniform: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Noise variance drawn with what the seeds at one budget show, and its log weight, (M,).

    It is drawn from their posterior with half of its degrees of freedom: what the budgets say
    together may be far out in the tail, which would leave few draws with all of the weight.
    """
    num_seeds, num_budgets = scores.shape
    scatter = (((scores - scores.mean(axis=0)) ** 2).sum(axis=0) / relative_noise**2).sum(axis=1)
    half_form = (1 + num_budgets * (num_seeds - 1)) / 4
    half_rate = ((_PRIOR_NOISE * np.ptp(scores)) ** 2 + scatter) / 4
    variance = half_rate / special.gammaincinv(half_form, uniform)
    log_weight = -half_form * np.log(variance * half_rate) - half_rate / variance
    return variance, log_weight - (num_seeds - 1) * np.log(relative_noise).sum(axis=1)


def _misfit_covariance(scores: FloatArray) -> FloatArray:
    """Covariance (K, K) of misfits as large as the rise between budgets; 0 at the smallest."""
    steps = np.diff(isotonic(scores.mean(axis=0)[None])[0])
    steps = np.maximum(steps, _LEAST_RISE * np.ptp(scores) / len(steps))
    path = np.tril(np.ones((len(steps) + 1, len(steps))), k=-1) * steps
    return np.asarray(path @ path.T)


def _lines(
    rise: FloatArray, means: FloatArray, covariance: FloatArray, drawn: _Proposals, bounds: Limits
) -> _Lines:
    """Draw ceiling and start from their truncated normal; integrate them out of the likelihood.

    Args:
        rise: Shape (M, K).
        means: Shape (K,).
        covariance: Shape (M, K, K). Of the means around the curve.
        drawn: The proposals.
        bounds: Limits of start and ceiling.
    """
    is_flat = drawn.shapes.family == FLAT
    is_free = ~is_flat & ~(drawn.is_capped & bounds.has_high)
    factor = np.linalg.cholesky(covariance)
    design = np.stack([1 - rise, rise, np.broadcast_to(means, rise.shape)], axis=2)
    white = np.linalg.solve(factor, design)
    products = np.swapaxes(white, 1, 2) @ white
    start_precision, shared, ceiling_product = products[:, 0, 0], products[:, 0, 1], products[:, 1]
    precision = np.maximum(ceiling_product[:, 1] - shared**2 / start_precision, 1e-12)
    onto_start = products[:, 0, 2]
    ceiling_mean = (ceiling_product[:, 2] - shared * onto_start / start_precision) / precision
    ceiling, ceiling_mass = _truncated(
        ceiling_mean, precision**-0.5, bounds.low, bounds.high, drawn.uniform[:, 1]
    )
    ceiling = np.where(is_free, ceiling, bounds.high)
    start_mean = (onto_start - shared * ceiling) / start_precision
    start, start_mass = _truncated(
        start_mean, start_precision**-0.5, bounds.low, ceiling, drawn.uniform[:, 2]
    )
    rest = products[:, 2, 2] - onto_start**2 / start_precision
    span = bounds.high - bounds.low
    log_likelihood = np.log(start_mass) - (rest + np.log(start_precision)) / 2
    log_likelihood -= np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1) + math.log(span)
    ceiling_part = (precision * ceiling_mean**2 - np.log(precision / math.tau)) / 2
    ceiling_part += np.log(ceiling_mass) + math.log(2 / span)
    capped_part = precision * bounds.high * (ceiling_mean - bounds.high / 2)
    ceiling_part = np.where(is_free, ceiling_part, np.where(is_flat, 0.0, capped_part))
    return _Lines(start, np.where(is_flat, start, ceiling), log_likelihood + ceiling_part)


def _truncated(
    mean: FloatArray,
    sd: FloatArray,
    low: float,
    high: float | FloatArray,
    uniform: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Normals between two limits by inverting their distribution, and the mass between, (M,).

    Above the mean both limits are mirrored: small masses are exact in the lower tail alone.
    """
    lower, upper = (low - mean) / sd, (high - mean) / sd
    is_mirrored = lower > 0
    sign = np.where(is_mirrored, -1.0, 1.0)
    lower, upper = np.where(is_mirrored, (-upper, -lower), (lower, upper))
    below, mass = special.ndtr(lower), special.ndtr(upper) - special.ndtr(lower)
    normal = sign * special.ndtri(np.clip(below + uniform * mass, _TINY, 1 - 1e-16))
    return np.clip(mean + sd * normal, low, high), np.maximum(mass, _TINY)


def _resample(log_weight: FloatArray, num_draws: int) -> tuple[IntArray, float]:
    """Indices of equally probable draws, and how many independent ones they are worth."""
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    places = (np.arange(num_draws) + 0.5) / num_draws
    chosen = np.searchsorted(np.cumsum(weight)[:-1], places)
    return chosen.astype(np.int64), float(1 / (weight**2).sum())


def _deviations(
    residual: FloatArray, misfit: FloatArray, noise: FloatArray, generator: np.random.Generator
) -> FloatArray:
    """Misfit at the budgets given the residuals, shape (M, K).

    By correcting a draw from the prior (Matheron's rule): exact, and without a second
    decomposition per draw.

    Args:
        residual: Shape (M, K). Mean scores minus their curve.
        misfit: Shape (M, K, K). Covariance of the misfit.
        noise: Shape (M, K). Variance of the means' seed noise.
        generator: For the draws.
    """
    num_budgets = residual.shape[1]
    # The misfit is 0 at the smallest budget, so its covariance has a factor without that row.
    inner = np.linalg.cholesky(misfit[:, 1:, 1:])
    normal = generator.standard_normal((*residual.shape, 2))
    prior = np.zeros_like(residual)
    prior[:, 1:] = (inner @ normal[:, 1:, :1])[..., 0]
    surprise = residual - prior - np.sqrt(noise) * normal[..., 1]
    covariance = misfit + noise[:, :, None] * np.eye(num_budgets)
    return np.asarray(prior + (misfit @ np.linalg.solve(covariance, surprise[..., None]))[..., 0])
