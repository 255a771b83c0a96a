"""Rising curves drawn from their posterior, given the scores of a few seeds at a few budgets.

The families of `growth` are averaged by their marginal likelihood (Hoeting et al. 1999). Priors
are weak: the places of a curve are uniform in logs, its exponents in square roots, over what the
budgets could tell apart; start and ceiling are uniform between the limits of the metric, the
ceiling above the start, or, as likely, the ceiling is the limit; the noise variance is inverse
gamma, worth one observation.

The sample is made by importance sampling. Shapes are drawn from the prior, the noise from what the
seeds at one budget show, start and ceiling from their exact truncated normal, and each draw is
weighed by the likelihood that is left. Two further rounds draw shapes where the weight was found
(as VEGAS does: Lepage 1978), and stay exact. Many budgets with little noise leave weight in a
place smaller than a strip: as long as the draws are worth too few independent ones, further rounds
draw around those of most weight (population Monte Carlo: Cappé et al. 2008), just as exact. Nothing
is optimised, and equal inputs give equal curves. `GrowthCurves.effective_draws` says what the
sample is worth in the end; where that is little, no curve fits and the sample means nothing.

Shape letters: K budgets, S seeds, M draws, C clouds.
"""

import itertools
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
# Equally probable: whether the curve tends to the limit of the metric, where it has one; the power
# of the noise; the standard deviation of the misfit, as a share of the rise.
_SETTINGS = np.array(list(itertools.product((1.0, 0.0), (0.0, 0.5, 1.0), (0.1, 0.2, 0.3))))
_LEAST_RISE = 0.1  # between two budgets, for the misfit: this share of the range per step
_PRIOR_NOISE = 0.05  # expected before looking: this share of the measured range
_NUM_PROPOSALS, _NUM_ROUNDS, _NUM_FURTHER_ROUNDS = 6000, 3, 10
_ENOUGH_DRAWS = 400.0  # worth so many independent ones, no further round is made
_NUM_STRIPS = 16  # into which the range of each shape parameter is divided
_KEPT_SHARE = 0.2  # of the proposals of a later round are drawn from the prior still
_HALVINGS = 0.5 ** np.arange(12)  # powers of the weights, until they are worth enough draws
_FREEDOM = 4.0  # degrees of freedom of the clouds
_LEAST_CLOUD = 0.003  # standard deviation, as a share of the range of a shape parameter
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
        place: Shape (M, 2). Their two parameters in the unit square of their family.
        setting: Shape (M,). Row of the settings, which the next three are out of.
        is_capped: Shape (M,). Whether the curve tends to the limit of the metric.
        noise_power: Shape (M,).
        misfit: Shape (M,).
        uniform: Shape (M, 3). What noise, ceiling and start are drawn with.
        log_prior: Shape (M,). Log of the prior density over that which they were drawn with.
    """

    shapes: Shapes
    place: FloatArray
    setting: IntArray
    is_capped: BoolArray
    noise_power: FloatArray
    misfit: FloatArray
    uniform: FloatArray
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
        plan = _refined(drawn, weighed.log_weight)
    best, most = (drawn, weighed), _effective(weighed.log_weight)
    for _ in range(_NUM_FURTHER_ROUNDS):
        if most >= _ENOUGH_DRAWS:
            break
        drawn = _propose_near(tokens, drawn, weighed.log_weight, generator)
        weighed = _weigh(problem, drawn)
        if (effective := _effective(weighed.log_weight)) > most:
            best, most = (drawn, weighed), effective
    return _sample(problem, *best, num_draws, generator)


def _sample(
    problem: _Problem,
    drawn: _Proposals,
    weighed: _Weighed,
    num_draws: int,
    generator: np.random.Generator,
) -> GrowthCurves:
    """Equally probable curves out of weighted ones."""
    chosen = _resample(weighed.log_weight, num_draws)
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
        effective_draws=_effective(weighed.log_weight),
    )


def _prior_plan() -> FloatArray:
    """Prior probability of each bin: squares of two shape parameters per family, shape (bins,)."""
    squares = _NUM_STRIPS**2
    return np.repeat(_PRIOR_SHARES / squares, squares)


def _propose(tokens: FloatArray, plan: FloatArray, generator: np.random.Generator) -> _Proposals:
    """Draws from a plan: bins in proportion to their probability, uniform inside each."""
    bins = _resample(np.log(np.maximum(plan, _TINY)), _NUM_PROPOSALS)
    family, square = np.divmod(bins, _NUM_STRIPS**2)
    corner = np.stack(np.divmod(square, _NUM_STRIPS), axis=1)
    uniform = generator.random((_NUM_PROPOSALS, 6)).clip(1e-9, 1 - 1e-9)
    return _proposals(
        tokens,
        family,
        (corner + uniform[:, :2]) / _NUM_STRIPS,
        (uniform[:, 2] * len(_SETTINGS)).astype(np.int64),
        uniform[:, 3:],
        np.log(_prior_plan()[bins] / plan[bins]),
    )


def _proposals(
    tokens: FloatArray,
    family: IntArray,
    place: FloatArray,
    setting: IntArray,
    uniform: FloatArray,
    log_prior: FloatArray,
) -> _Proposals:
    """Proposals from where they lie in the unit square of their family."""
    first, second = place.T
    nearest, farthest = tokens[0] / _REACH[0], tokens[-1] * _REACH[1]
    least, most = np.sqrt(_EXPONENTS)[family].T
    return _Proposals(
        Shapes(
            family,
            nearest * (farthest / nearest) ** first,
            (least + (most - least) * second) ** 2,
        ),
        place,
        setting,
        _SETTINGS[setting, 0] > 0,
        _SETTINGS[setting, 1],
        _SETTINGS[setting, 2],
        uniform,
        log_prior,
    )


def _refined(drawn: _Proposals, log_weight: FloatArray) -> FloatArray:
    """The plan of the next round: most draws where the weight of this one lies."""
    weight = np.exp(log_weight - log_weight.max())
    strip = (drawn.place * _NUM_STRIPS).astype(np.int64)
    bins = (drawn.shapes.family * _NUM_STRIPS + strip[:, 0]) * _NUM_STRIPS + strip[:, 1]
    prior = _prior_plan()
    found = np.bincount(bins, weight, len(prior)) / weight.sum()
    return np.asarray(_KEPT_SHARE * prior + (1 - _KEPT_SHARE) * found)


def _propose_near(
    tokens: FloatArray, drawn: _Proposals, log_weight: FloatArray, generator: np.random.Generator
) -> _Proposals:
    """Draws around those that weigh most, and a share from the prior.

    Families and settings are drawn as often as they weighed, the two parameters of a shape from
    a cloud for its family, capped or not. Draws outside the unit square weigh nothing.
    """
    weight = _tempered(log_weight)
    num_settings = len(_SETTINGS)
    prior = np.repeat(_PRIOR_SHARES / num_settings, num_settings)
    group = drawn.shapes.family * num_settings + drawn.setting
    found = (1 - _KEPT_SHARE) * np.bincount(group, weight, len(prior))
    kept = _KEPT_SHARE * prior
    chosen = _resample(np.log(kept + found), _NUM_PROPOSALS)
    cloud, num_clouds = chosen // (num_settings // 2), 2 * len(_PRIOR_SHARES)
    mean, factor = _clouds(drawn.place, weight, group // (num_settings // 2), num_clouds)
    uniform = generator.random((_NUM_PROPOSALS, 6)).clip(1e-9, 1 - 1e-9)
    stretch = np.sqrt(_FREEDOM / generator.chisquare(_FREEDOM, _NUM_PROPOSALS))
    normal = generator.standard_normal((_NUM_PROPOSALS, 2, 1)) * stretch[:, None, None]
    near = mean[cloud] + (factor[cloud] @ normal)[..., 0]
    is_kept = uniform[:, 2] * (kept + found)[chosen] < kept[chosen]
    place = np.where(is_kept[:, None], uniform[:, :2], near)
    density = kept[chosen] + found[chosen] * _cloud_density(place, mean[cloud], factor[cloud])
    is_inside = ((place > 0) & (place < 1)).all(axis=1)
    log_prior = np.where(is_inside, np.log(prior[chosen] / density), -np.inf)
    family, setting = np.divmod(chosen, num_settings)
    return _proposals(tokens, family, place.clip(0, 1), setting, uniform[:, 3:], log_prior)


def _tempered(log_weight: FloatArray) -> FloatArray:
    """Weights that sum to 1, to the first power that makes them worth enough draws, (M,)."""
    powers = (power for power in _HALVINGS if _effective(power * log_weight) >= _ENOUGH_DRAWS / 2)
    power = next(powers, _HALVINGS[-1])
    weight = np.exp(power * (log_weight - log_weight.max()))
    return np.asarray(weight / weight.sum())


def _clouds(
    place: FloatArray, weight: FloatArray, cloud: IntArray, num_clouds: int
) -> tuple[FloatArray, FloatArray]:
    """Mean (C, 2) of the places in each cloud, and the Cholesky factor (C, 2, 2) of their spread.

    Args:
        place: Shape (M, 2).
        weight: Shape (M,).
        cloud: Shape (M,). Which cloud each belongs to.
        num_clouds: C.
    """
    share = weight * (cloud == np.arange(num_clouds)[:, None])
    share /= np.maximum(share.sum(axis=1, keepdims=True), _TINY)
    mean = share @ place
    away = place - mean[:, None]
    spread = np.einsum("cm,cmi,cmj->cij", share, away, away) + _LEAST_CLOUD**2 * np.eye(2)
    return mean, np.linalg.cholesky(spread)


def _cloud_density(place: FloatArray, mean: FloatArray, factor: FloatArray) -> FloatArray:
    """Density of Student's t in two dimensions, (M,), at places (M, 2) of clouds given for each."""
    white = np.linalg.solve(factor, (place - mean)[..., None])[..., 0]
    scale = math.tau * factor[:, 0, 0] * factor[:, 1, 1]
    return np.asarray((1 + (white**2).sum(axis=1) / _FREEDOM) ** (-(_FREEDOM + 2) / 2) / scale)


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


def _resample(log_weight: FloatArray, num_draws: int) -> IntArray:
    """Indices of equally probable draws, in rising order."""
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    places = (np.arange(num_draws) + 0.5) / num_draws
    return np.searchsorted(np.cumsum(weight)[:-1], places).astype(np.int64)


def _effective(log_weight: FloatArray) -> float:
    """How many independent draws weighted ones are worth (Kish 1965)."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / (weight**2).sum())


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
