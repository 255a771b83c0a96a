"""Simulated learning curves of kinds that the forecast does not know, to try it on."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from tell_core.analysis.resampling import FloatArray

NUM_MEASURED = 5
BUDGETS = 1000 * 2.0 ** np.arange(NUM_MEASURED + 2)
ACCURACY, LOG_PROBABILITY = (0.0, 1.0), (-np.inf, 0.0)


class Growing(NamedTuple):
    """A simulated curve.

    Attributes:
        tokens: Shape (7,). Five measured budgets, and two beyond: twice and four times the largest.
        scores: Shape (S, 7).
        limits: Lowest and highest score there can be.
    """

    tokens: FloatArray
    scores: FloatArray
    limits: tuple[float, float]


Family = Callable[[np.random.Generator], FloatArray]


def simulate(family: str, seed: int, num_seeds: int = 3) -> Growing:
    """A curve of a family, with seed noise of 0.5 to 5 % of its range.

    In half of the studies the noise shrinks towards the limits of the score.
    """
    generator = np.random.default_rng([seed, list(FAMILIES).index(family)])
    make, limits = FAMILIES[family]
    truth = make(generator)
    span = 1.0 if limits == ACCURACY else -truth[0]
    noise = np.full(len(truth), span * _log_uniform(generator, 0.005, 0.05))
    if generator.random() < 0.5:
        room = 2 * np.sqrt(truth * (1 - truth)) if limits == ACCURACY else truth / truth[0]
        noise *= np.maximum(room, 0.05)
    scores = truth + generator.normal(size=(num_seeds, len(truth))) * noise
    return Growing(BUDGETS, np.clip(scores, *limits), limits)


def expected(family: str, seed: int) -> FloatArray:
    """The curve that `simulate` adds noise to, shape (7,)."""
    generator = np.random.default_rng([seed, list(FAMILIES).index(family)])
    return FAMILIES[family][0](generator)


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** generator.random())


def _quanta(generator: np.random.Generator) -> FloatArray:
    """Share of what is not learned yet: quanta of Zipf frequency, each learned exponentially."""
    use = np.arange(1, generator.integers(5, 60) + 1) ** -(1 + generator.uniform(0.2, 1.2))
    speed = _log_uniform(generator, 0.3, 30) * use / use[0]
    return (use / use.sum()) @ np.exp(-speed[:, None] * BUDGETS / BUDGETS[0])


def _quanta_accuracy(generator: np.random.Generator) -> FloatArray:
    return generator.uniform(0.5, 1) * (1 - _quanta(generator))


def _quanta_loss(generator: np.random.Generator) -> FloatArray:
    return -(generator.uniform(0, 0.5) * generator.integers(0, 2) + 2 * _quanta(generator))


def _stairs(generator: np.random.Generator) -> FloatArray:
    """One to five skills, each learned in a step of its own somewhere, also beyond the budgets."""
    num_steps = generator.integers(1, 6)
    weight = generator.dirichlet(np.ones(num_steps))
    place = [_log_uniform(generator, 700, 40_000) for _ in weight]
    steepness = generator.uniform(1, 6)
    return weight @ (1 / (1 + (BUDGETS / np.asarray(place)[:, None]) ** -steepness))


def _gompertz(generator: np.random.Generator) -> FloatArray:
    place, steepness = _log_uniform(generator, 700, 24_000), generator.uniform(0.5, 3)
    share = np.exp(-np.exp(-steepness * np.log(BUDGETS / place)))
    low = generator.uniform(0, 0.4)
    return low + (generator.uniform(0.6, 1) - low) * share


def _probit(generator: np.random.Generator) -> FloatArray:
    place, steepness = _log_uniform(generator, 700, 24_000), generator.uniform(0.4, 2.5)
    low = generator.uniform(0, 0.5)
    share = stats.norm.cdf(steepness * np.log(BUDGETS / place))
    return low + (generator.uniform(0.6, 1) - low) * share


def _power_loss(generator: np.random.Generator) -> FloatArray:
    decay = (BUDGETS / BUDGETS[0]) ** -generator.uniform(0.15, 1.2)
    return -(generator.uniform(0, 1) + generator.uniform(0.5, 3) * decay)


def _log_linear(generator: np.random.Generator) -> FloatArray:
    rise = generator.uniform(0.02, 0.15) * np.log2(BUDGETS / BUDGETS[0])
    return np.minimum(generator.uniform(0.1, 0.5) + rise, 0.98)


FAMILIES: Mapping[str, tuple[Family, tuple[float, float]]] = {
    "quanta": (_quanta_accuracy, ACCURACY),
    "stairs": (_stairs, ACCURACY),
    "gompertz": (_gompertz, ACCURACY),
    "probit": (_probit, ACCURACY),
    "log_linear": (_log_linear, ACCURACY),
    "quanta_loss": (_quanta_loss, LOG_PROBABILITY),
    "power_loss": (_power_loss, LOG_PROBABILITY),
}
