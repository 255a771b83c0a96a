import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.resampling import Resampling, interval, item_weights, seed_deviations


@given(st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_item_weights_count_as_many_items_as_there_are(num_items: int, seed: int) -> None:
    weights = item_weights(num_items, Resampling(num_draws=20, seed=seed))

    assert weights.shape == (20, num_items)
    assert (weights.sum(axis=1) == num_items).all()


@given(st.integers(1, 10), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_seed_deviations_sum_to_zero(num_seeds: int, seed: int) -> None:
    deviations = seed_deviations(num_seeds, Resampling(num_draws=20, seed=seed))

    assert deviations.shape == (20, num_seeds)
    assert np.abs(deviations.sum(axis=1)).max() < 1e-9 * (1 + np.abs(deviations).max())


def test_equal_seeds_give_equal_draws() -> None:
    settings_ = Resampling(num_draws=50, seed=3)

    assert (item_weights(7, settings_) == item_weights(7, settings_)).all()
    assert (seed_deviations(4, settings_) == seed_deviations(4, settings_)).all()


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_interval_of_a_mean_over_few_seeds_covers_as_often_as_it_says(num_seeds: int) -> None:
    deviations = seed_deviations(num_seeds, Resampling(num_draws=2000))
    samples = np.random.default_rng(0).normal(size=(1000, num_seeds))

    draws = samples.mean(axis=1)[:, None] + samples @ deviations.T
    ends = [interval(row, row, 0.95) for row in draws]

    covered = np.mean([low <= 0 <= high for low, high in ends])  # type: ignore[operator]
    assert 0.93 <= covered <= 0.97


def test_an_end_among_infinite_draws_is_unbounded() -> None:
    lower, upper = np.arange(100.0), np.r_[np.arange(90.0), np.full(10, np.inf)]

    assert interval(lower, upper, 0.95) == (2.0, None)


def test_an_end_short_of_the_infinite_draws_is_finite() -> None:
    lower, upper = np.arange(101.0), np.r_[np.arange(99.0), np.full(2, np.inf)]

    assert interval(lower, upper, 0.95) == (2.0, 98.0)
