import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.multiple import holm, two_sided_p_value
from tell_core.analysis.resampling import interval

p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12)


@given(st.integers(100, 400), st.floats(-3, 3), st.integers(0, 1000), st.floats(0.5, 0.98))
@settings(deadline=None)
def test_the_p_value_agrees_with_the_interval_of_the_same_draws(
    num_draws: int, shift: float, seed: int, confidence: float
) -> None:
    draws = np.random.default_rng(seed).normal(shift, 1, num_draws)

    low, high = interval(draws, draws, confidence)
    p_value = two_sided_p_value(draws, draws)

    assert low is not None and high is not None
    assert (p_value <= 1 - confidence + 1e-12) == (low > 0 or high < 0)


def test_draws_about_which_nothing_is_known_speak_for_both_sides() -> None:
    lower, upper = np.ones(200), np.ones(200)
    lower[:20], upper[:20] = -np.inf, np.inf

    assert two_sided_p_value(lower, upper) == pytest.approx(2 * 20 / 199)


def test_a_p_value_is_never_less_than_its_draws_can_show() -> None:
    assert two_sided_p_value(np.ones(1001), np.ones(1001)) == pytest.approx(1 / 1000)


def test_p_values_of_no_difference_are_uniform() -> None:
    generator = np.random.default_rng(0)
    shifts = generator.normal(size=800)

    values = [
        two_sided_p_value(draws, draws) for draws in generator.normal(shifts, 1, (400, 800)).T
    ]

    for share in (0.05, 0.2, 0.5):
        assert np.mean(np.asarray(values) <= share) == pytest.approx(share, abs=0.04)


@given(p_values)
def test_corrected_p_values_are_larger_keep_the_order_and_leave_out_the_undefined(
    values: list[float | None],
) -> None:
    corrected = holm(values)

    known = [
        (value, found) for value, found in zip(values, corrected, strict=True) if value is not None
    ]
    assert [found is None for found in corrected] == [value is None for value in values]
    assert all(value <= found <= 1 for value, found in known)  # type: ignore[operator]
    ordered = [found for _, found in sorted(known)]
    assert ordered == sorted(ordered)  # type: ignore[type-var]


def test_holm_agrees_with_an_example_done_by_hand() -> None:
    assert holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])
