import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.power_law import (
    bootstrap_exponent,
    log_slope,
    power_law_fit,
    quantum_loss,
    zipf_frequencies,
)
from tell_core.analysis.resampling import Resampling
from tell_core.errors import AnalysisError

X = np.logspace(0, 3, 15)


@given(st.floats(0.15, 1.5), st.floats(0, 2), st.floats(0.5, 3))
@settings(max_examples=25, deadline=None)
def test_a_curve_without_noise_gives_its_own_parameters(
    exponent: float, offset: float, amplitude: float
) -> None:
    fit = power_law_fit(X, offset + amplitude * X**-exponent)

    assert fit.exponent == pytest.approx(exponent, abs=1e-3)
    assert fit.offset == pytest.approx(offset, abs=5e-3)
    assert fit.predict(X) == pytest.approx(offset + amplitude * X**-exponent, rel=1e-3)


@pytest.mark.parametrize("exponent", [0.34, 0.8])
def test_exponent_and_interval_hold_over_two_hundred_trials(exponent: float) -> None:
    generator = np.random.default_rng(0)
    truth = 0.3 + X**-exponent

    fits = [power_law_fit(X, truth * (1 + 0.01 * generator.normal(size=15))) for _ in range(200)]

    errors = np.array([fit.exponent - exponent for fit in fits])
    covered = np.mean([(f.low or 0) <= exponent <= (f.high or np.inf) for f in fits])
    assert np.sqrt(np.mean(errors**2)) <= 0.02
    assert 0.90 <= covered <= 0.985


def test_an_exponent_the_data_do_not_determine_has_an_open_interval() -> None:
    noise = np.random.default_rng(0).normal(size=15)

    fit = power_law_fit(X, 1 + 0.05 * noise, has_relative_noise=False)

    assert fit.low is None or fit.high is None


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2, 3], [3.0, 2, 1], "at least 4 different x"),
        ([0.0, 1, 2, 3], [4.0, 3, 2, 1], "x above 0"),
        ([1.0, 2, 3, 4], [4.0, 3, np.nan, 1], "finite"),
        ([1.0, 2, 3, 4], [4.0, 3, 0, 1], "above 0"),
    ],
)
def test_unusable_data_are_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        power_law_fit(np.array(x), np.array(y))


@given(st.integers(1, 300), st.floats(0.1, 2))
@settings(max_examples=25, deadline=None)
def test_use_frequencies_sum_to_one_and_fall(num_quanta: int, alpha: float) -> None:
    frequencies = zipf_frequencies(num_quanta, alpha)

    assert frequencies.sum() == pytest.approx(1)
    assert (np.diff(frequencies) < 0).all()


@given(st.floats(1, 20), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_the_loss_of_many_quanta_falls_from_one_to_nothing(
    sharpness: float, scatter: float
) -> None:
    frequencies = zipf_frequencies(50, 0.4)
    time = np.geomspace(1e-8, 1e12, 60)

    loss = quantum_loss(time, frequencies, 10 / frequencies, sharpness, scatter)

    assert (np.diff(loss) <= 1e-12).all()
    assert loss[0] == pytest.approx(1, abs=1e-3)
    assert loss[-1] == pytest.approx(0, abs=1e-3)


def test_half_of_a_quantum_is_left_at_its_learning_time() -> None:
    loss = quantum_loss(np.array([30.0]), np.ones(1), np.array([30.0]), 5.0, 0.4)

    assert loss[0] == pytest.approx(0.5)


def test_a_bootstrap_interval_holds_the_estimate_and_widens_with_the_noise() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=15)
    widths = []
    for size in (0.005, 0.02):
        y = (0.3 + X**-0.5) * (1 + size * noise)
        fit = power_law_fit(X, y)
        found = bootstrap_exponent(X, y, fit, Resampling(num_draws=300))
        assert found.low < fit.exponent < found.high
        widths.append(found.high / found.low)

    assert widths[1] > widths[0]


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    assert log_slope(X, 3 * X**-0.7) == pytest.approx(-0.7)
