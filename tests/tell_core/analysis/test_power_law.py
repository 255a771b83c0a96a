import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.power_law import power_law_fit
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
