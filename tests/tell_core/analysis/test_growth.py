import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.growth import EXPONENTIAL, FLAT, LOGISTIC, POWER_LAW, Limits, Shapes
from tell_core.analysis.growth_posterior import grow
from tests.tell_core.analysis.growing import FAMILIES, NUM_MEASURED, Growing, simulate

GRID = np.geomspace(1000, 64_000, 30)


@given(
    st.sampled_from([POWER_LAW, EXPONENTIAL, LOGISTIC]),
    st.floats(100, 1e6),
    st.floats(0.02, 10),
)
@settings(deadline=None)
def test_every_shape_starts_at_zero_and_rises_to_at_most_one(
    family: int, place: float, exponent: float
) -> None:
    shapes = Shapes(np.array([family]), np.array([place]), np.array([exponent]))

    rise = shapes.rise(1000.0, GRID)[0]

    assert rise[0] == pytest.approx(0, abs=1e-12)
    assert (np.diff(rise) >= -1e-12).all()
    assert (rise <= 1).all()


def test_the_shapes_are_the_formulas_of_the_module() -> None:
    tokens, first, place, power = 5000.0, 1000.0, 3000.0, 1.5
    family = np.array([POWER_LAW, EXPONENTIAL, LOGISTIC, FLAT])
    shapes = Shapes(family, np.full(4, place), np.full(4, power))

    rise = shapes.rise(first, np.array([tokens]))[:, 0]

    expected = [
        1 - (first / tokens) ** power,
        1 - np.exp((first / place) ** power - (tokens / place) ** power),
        1 - (1 + (first / place) ** power) / (1 + (tokens / place) ** power),
        0.0,
    ]
    assert rise == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_noise_shrinks_towards_limits_alone(one: float, other: float) -> None:
    scores = np.array([one, other])
    both = Limits.of(scores, (0.0, 1.0)).noise(scores, np.array(1.0))
    nearer = abs(one - 0.5) > abs(other - 0.5)

    assert (both <= 1).all() and (both > 0).all()
    assert not nearer or both[0] <= both[1]
    free = Limits(0.0, 1.0, False, False)
    assert (free.noise(scores, np.array(1.0)) == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_curves_pass_through_what_was_measured(family: str, seed: int) -> None:
    study = _measured(simulate(family, seed))

    expected = grow(*study).at(study.tokens)

    low, high = np.quantile(expected, [0.005, 0.995], axis=0)
    spread = study.scores.std(axis=0, ddof=1).max() + 0.02 * np.ptp(study.scores)
    assert (low - spread <= study.scores.mean(axis=0)).all()
    assert (study.scores.mean(axis=0) <= high + spread).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_curves_stay_inside_the_limits_and_rise_beyond_the_budgets(family: str) -> None:
    study = _measured(simulate(family, 3))
    beyond = study.tokens[-1] * np.array([1.0, 1.5, 2.0, 4.0])

    expected = grow(*study).at(beyond)

    assert (expected >= study.limits[0]).all() and (expected <= study.limits[1]).all()
    assert (np.diff(expected, axis=1) >= -1e-9).all()


def test_a_logistic_curve_without_noise_is_found_again() -> None:
    tokens = 1000 * 2.0 ** np.arange(7)
    truth = 0.1 + 0.8 / (1 + (tokens / 6000) ** -2.0)
    noise = np.array([[-1e-3], [0.0], [1e-3]])

    curves = grow(tokens[:5], truth[:5] + noise, (0.0, 1.0))

    assert np.median(curves.at(tokens[5:]), axis=0) == pytest.approx(truth[5:], abs=0.04)


def test_equal_inputs_give_equal_curves_and_another_seed_nearly_equal_ones() -> None:
    study = _measured(simulate("gompertz", 0))
    ahead = study.tokens[-1:] * 2

    first, again, other = (grow(*study, seed=seed).at(ahead) for seed in (0, 0, 1))

    assert (first == again).all()
    quantiles = [np.quantile(one, [0.1, 0.5, 0.9]) for one in (first, other)]
    assert quantiles[0] == pytest.approx(quantiles[1], abs=0.03)


def test_equal_means_with_noise_between_seeds_are_a_flat_curve() -> None:
    scores = np.array([[0.4, 0.6, 0.4], [0.6, 0.4, 0.6]])

    expected = grow(np.array([1e3, 2e3, 4e3]), scores, (0.0, 1.0)).at(np.array([8e3]))

    assert 0.4 < np.median(expected) < 0.75


def test_no_few_draws_hold_all_of_the_weight() -> None:
    draws = [grow(*_measured(simulate(family, 5))).effective_draws for family in FAMILIES]

    assert min(draws) > 100


@pytest.mark.parametrize("num_budgets", [8, 10])
@pytest.mark.parametrize("noise", [0.002, 0.0002])
def test_many_budgets_with_tiny_noise_leave_many_draws_too(num_budgets: int, noise: float) -> None:
    tokens = 1000 * 2.0 ** np.arange(num_budgets)
    truth = 1 / (1 + (tokens / 8000) ** -1.5)
    scores = truth + np.random.default_rng(0).normal(0, noise, (3, num_budgets))

    curves = grow(tokens, np.clip(scores, 0, 1), (0.0, 1.0))

    assert curves.effective_draws > 200
    spread = 0.02 + 3 * noise
    assert np.median(curves.at(tokens), axis=0) == pytest.approx(truth, abs=spread)


def _measured(study: Growing) -> Growing:
    """What a run would know of it."""
    return Growing(study.tokens[:NUM_MEASURED], study.scores[:, :NUM_MEASURED], study.limits)
