"""Scaling of a curve: what is claimed, what is refused, and the slope that K quanta predict."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tell_core.analysis.power_law import power_law_fit, zipf_frequencies
from tell_core.analysis.scaling import (
    MIN_POINTS,
    ScalingFit,
    asymptotic_slope,
    finite_k,
    fit_scaling,
    on_common_scale,
    zipf_fit,
)
from tell_core.analysis.sequence import learning_times
from tell_core.errors import AnalysisError

X = np.logspace(0, 2.6, 12)
exponents = st.floats(0.3, 1.3)
few = settings(max_examples=15, deadline=None)


def seeds_of(curve: np.ndarray, noise: float = 0.0, num_seeds: int = 3, seed: int = 0):
    generator = np.random.default_rng(seed)
    return curve * (1 + noise * generator.normal(size=(num_seeds, len(curve))))


@given(exponents, st.floats(0, 2), st.floats(0.5, 3), st.integers(1, 4))
@few
def test_a_curve_without_noise_gives_its_own_parameters(exponent, offset, amplitude, num_seeds):
    fit = fit_scaling(X, seeds_of(offset + amplitude * X**-exponent, num_seeds=num_seeds))

    assert fit.best == "power law"
    assert fit.exponent == pytest.approx(exponent, abs=1e-3)
    assert fit.offset == pytest.approx(offset, abs=5e-3)
    assert fit.amplitude == pytest.approx(amplitude, abs=1e-2)


@given(exponents, st.floats(1e-3, 1e6), st.floats(1e-2, 1e2), st.integers(0, 99))
@few
def test_units_of_x_and_of_the_loss_change_neither_exponent_nor_verdict(
    exponent, unit, scale, seed
) -> None:
    losses = seeds_of(0.3 + X**-exponent, 0.01, seed=seed)

    fit, other = fit_scaling(X, losses), fit_scaling(unit * X, scale * losses)

    assert other.status == fit.status
    assert other.best == fit.best
    assert other.exponent == pytest.approx(fit.exponent, rel=1e-4)
    assert other.low == pytest.approx(fit.low, rel=1e-3)
    assert other.high == pytest.approx(fit.high, rel=1e-3)
    assert other.offset == pytest.approx(scale * fit.offset, rel=1e-3)
    for name, delta in fit.delta_aicc.items():
        assert other.delta_aicc[name] == pytest.approx(delta, abs=0.05)


@given(exponents, st.floats(-0.5, 1), st.floats(0.01, 0.1), st.integers(0, 99))
@few
def test_no_law_ends_below_a_loss_of_zero(exponent, offset, noise, seed) -> None:
    curve = np.maximum(offset + 3 * X**-exponent, 0.05)

    fit = fit_scaling(X, seeds_of(curve, noise, seed=seed))

    assert fit.offset is None or fit.offset >= 0


def test_a_curve_on_its_way_below_zero_is_fitted_as_one_that_ends_at_zero() -> None:
    x = np.logspace(0, 1, 12)
    free = power_law_fit(x, 4 * x**-0.3 - 1)
    bound = power_law_fit(x, 4 * x**-0.3 - 1, least_offset=0.0)

    assert free.offset == pytest.approx(-1, abs=0.01)
    assert bound.offset == 0
    assert bound.exponent > free.exponent
    assert fit_scaling(x, seeds_of(4 * x**-0.3 - 1, 0.01)).status != "power law"


@given(st.permutations(range(4)))
@few
def test_the_order_of_seeds_does_not_matter(order) -> None:
    losses = seeds_of(0.3 + X**-0.5, 0.02, num_seeds=4)

    first, second = fit_scaling(X, losses), fit_scaling(X, losses[order])

    assert second.low == pytest.approx(first.low)
    assert second.high == pytest.approx(first.high)


@given(st.integers(1, len(X)))
@few
def test_fewer_points_than_needed_are_refused_at_any_number_below(num_points: int) -> None:
    fit = fit_scaling(X[:num_points], seeds_of(0.3 + X**-0.5)[:, :num_points])

    is_refused = fit.reason is not None and "points" in fit.reason
    assert is_refused == (num_points < MIN_POINTS)
    assert (fit.exponent is None) == is_refused


@given(st.sampled_from([0.01, 0.05]), st.integers(0, 200))
@few
def test_curves_that_are_no_power_law_are_not_called_one(noise: float, seed: int) -> None:
    curves = {
        "exponential": 0.3 + 3 * np.exp(-X / 60),
        "logistic": 0.3 + 3 / (1 + (X / 30) ** 2),
        "log-linear": 3 - 0.4 * np.log(X),
    }
    for name, curve in curves.items():
        fit = fit_scaling(X, seeds_of(curve, noise, seed=seed))

        assert fit.status != "power law"
        assert fit.reason
        if name != "log-linear":
            assert fit.status == "another curve"


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (np.full(12, 2.0), "does not fall"),
        (2 + 0.1 * np.log(X), "does not fall"),
        (1 + 0.3 * (np.log(X) - 3) ** 2, "turns round"),
        (1 + 0.3 * (np.log(X) - 4) ** 2, "turns round"),
    ],
)
def test_what_does_not_fall_has_no_exponent(curve: np.ndarray, words: str) -> None:
    fit = fit_scaling(X, seeds_of(curve, 0.01))

    assert fit.status == "undetermined"
    assert words in (fit.reason or "")
    assert fit.exponent is None


def test_one_seed_has_an_exponent_and_no_interval() -> None:
    fit = fit_scaling(X, seeds_of(0.3 + X**-0.5, 0.01, num_seeds=1))

    assert (fit.status, fit.low, fit.high) == ("undetermined", None, None)
    assert "one seed" in (fit.reason or "")
    assert fit.exponent == pytest.approx(0.5, abs=0.1)


def test_an_interval_that_leaves_the_search_is_no_interval() -> None:
    """Two seeds that do not agree: Student's interval with one degree of freedom has no end."""
    losses = np.stack([0.3 + X**-0.2, 0.3 + X**-1.8])

    fit = fit_scaling(X, losses)

    assert fit.status != "power law"
    assert None in (fit.low, fit.high)


def test_a_loss_that_is_not_finite_is_told() -> None:
    losses = seeds_of(0.3 + X**-0.5)
    losses[1, 3] = np.nan

    assert "not a finite number" in (fit_scaling(X, losses).reason or "")


@pytest.mark.parametrize(
    ("x", "losses"), [(X[::-1], seeds_of(X)), (X - 1, seeds_of(X)), (X[:5], seeds_of(X))]
)
def test_unusable_curves_are_refused(x: np.ndarray, losses: np.ndarray) -> None:
    with pytest.raises(AnalysisError, match="scaling curve"):
        fit_scaling(x, losses)


@pytest.mark.parametrize("between", [0.0, 0.1])
def test_the_interval_covers_where_seeds_differ_and_where_they_do_not(between: float) -> None:
    """Three seeds, 12 points, noise of 1 %; exponents of seeds with this spread around 0.5."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(100):
        own = 0.5 * np.exp(between * generator.normal(size=(3, 1)))
        losses = (0.3 + X**-own) * (1 + 0.01 * generator.normal(size=(3, len(X))))
        fit = fit_scaling(X, losses)
        covered.append((fit.low or 0) <= 0.5 <= (fit.high or np.inf))

    assert np.mean(covered) >= 0.90


@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=4))
@few
def test_seeds_whose_steps_differ_a_little_are_read_at_the_same_ones(factors) -> None:
    curves = [(X * factor, (X * factor) ** -0.5) for factor in factors]

    x, values = on_common_scale(curves)

    assert values == pytest.approx(np.broadcast_to(x**-0.5, values.shape), rel=1e-9)
    assert x[0] >= max(factors) - 1e-9
    assert x[-1] <= min(factors) * X[-1] * (1 + 1e-9)


def world(beta: float, num_quanta: int = 60, alpha: float = 0.4, scatter: float = 0.0):
    """Steps, losses, times and use of quanta that fall at use ** -beta."""
    steps = np.unique(np.geomspace(1, 20_000, 40).astype(int)).astype(np.float64)
    use = zipf_frequencies(num_quanta, alpha)
    noise = np.random.default_rng(0).normal(0, scatter, num_quanta)
    middles = np.log(8) - beta * np.log(use / use[0]) + noise
    losses = 2 / (1 + np.exp(5 * (np.log(steps)[:, None] - middles)))
    return steps, losses, learning_times(steps - 1, losses), use


@given(st.floats(0.5, 1.2), st.floats(0.0, 0.4))
@few
def test_the_slope_of_known_quanta_is_predicted(beta: float, scatter: float) -> None:
    steps, losses, times, use = world(beta, scatter=scatter)

    found = finite_k(steps, losses, times, use, use, losses @ use)

    assert found.beta == pytest.approx(beta, abs=0.15 * (0.3 + scatter))
    assert found.predicted_slope == pytest.approx(found.slope, abs=0.05)


@given(st.floats(0.1, 10))
@few
def test_a_common_factor_of_use_changes_no_predicted_slope(factor: float) -> None:
    """The share of general data in a mixture is such a factor."""
    steps, losses, times, use = world(0.8, scatter=0.2)

    found = [
        finite_k(steps, losses, times, share * use, share * use, losses @ use)
        for share in (1.0, factor)
    ]

    assert found[1].predicted == pytest.approx(found[0].predicted)
    assert found[1].predicted.max() <= 1


def test_units_of_equal_use_predict_no_slope() -> None:
    steps, losses, times, use = world(0.8)

    with pytest.raises(AnalysisError):
        finite_k(steps, losses, times, np.full_like(use, 0.1), use, losses @ use)


@given(st.floats(0.05, 1.5), st.integers(12, 200))
@few
def test_a_zipf_law_gives_its_exponent(alpha: float, num_quanta: int) -> None:
    found = zipf_fit(np.random.default_rng(0).permutation(zipf_frequencies(num_quanta, alpha)))

    assert found.alpha == pytest.approx(alpha, abs=1e-3)


@pytest.mark.parametrize(
    ("frequencies", "words"),
    [
        (np.ones(4) / 4, "4 skills"),
        (np.exp(-0.3 * np.arange(20)), "exponentially"),
        (np.arange(1, 31.0) ** -0.5, "the law needs above 1"),
        (np.ones(20) / 20, "exponentially"),
    ],
)
def test_use_that_is_no_zipf_law_has_no_exponent(frequencies: np.ndarray, words: str) -> None:
    found = zipf_fit(frequencies)

    assert found.alpha is None
    assert words in (found.reason or "")


@given(st.floats(0.1, 2), st.floats(-1, 2))
def test_the_limit_needs_learning_times_that_fall_with_use(alpha: float, beta: float) -> None:
    assume(abs(beta) > 1e-6)

    assert (asymptotic_slope(alpha, beta) is None) == (beta < 0)


def test_a_fit_that_is_refused_keeps_its_counts() -> None:
    fit = fit_scaling(X[:3], seeds_of(X**-0.5)[:, :3])

    assert isinstance(fit, ScalingFit)
    assert (fit.num_points, fit.num_seeds, fit.status) == (3, 3, "undetermined")
