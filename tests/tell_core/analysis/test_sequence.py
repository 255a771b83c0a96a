from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.duration.survfunc import survdiff

from tell_core.analysis.sequence import (
    KNOWN_LOSS,
    LearningTimes,
    censored_regression,
    cluster_weights,
    learning_order,
    learning_times,
    log_rank,
    rank_agreement,
    ranks,
    strata_of,
    survival_curve,
)
from tell_core.errors import AnalysisError

STEPS = np.array([0, 1, 3, 7, 15, 31])


def times_at(probes: list[int], num_probes: int = 6) -> LearningTimes:
    """Units learned at the given probes; ``num_probes`` is never."""
    at = np.asarray(probes)
    log_times = np.log1p(STEPS[np.minimum(at, num_probes - 1)])
    is_learned = at < num_probes
    return LearningTimes(log_times, at, is_learned, np.zeros(len(at), dtype=bool), np.ones(len(at)))


@given(st.floats(0.2, 5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_learning_times_do_not_depend_on_the_unit_of_the_loss(unit: float, seed: int) -> None:
    losses = np.random.default_rng(seed).uniform(0.1, 2, (6, 5))

    plain, scaled = learning_times(STEPS, losses), learning_times(STEPS, unit * losses)

    assert scaled.log_times == pytest.approx(plain.log_times)
    assert np.array_equal(scaled.is_learned, plain.is_learned)


def test_the_time_of_learning_is_interpolated_between_probes() -> None:
    losses = np.array([[2.0], [2.0], [1.5], [0.5], [0.1], [0.1]])

    times = learning_times(STEPS, losses)

    assert times.probes.tolist() == [3]
    assert np.exp(times.log_times[0]) == pytest.approx(np.sqrt(4 * 8))


def test_learned_for_good_is_the_last_fall() -> None:
    losses = np.array([[2.0, 2.0], [0.5, 0.5], [1.8, 1.8], [0.5, 0.4], [0.1, 1.9], [0.1, 1.9]])

    first, last = (learning_times(STEPS, losses, is_for_good=good) for good in (False, True))

    assert first.probes.tolist() == [1, 1]
    assert last.probes.tolist() == [3, len(STEPS)]
    assert last.is_learned.tolist() == [True, False]


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_nothing_is_learned_for_good_before_it_is_learned(seed: int) -> None:
    losses = np.random.default_rng(seed).uniform(0.1, 2, (6, 5))

    first, last = (learning_times(STEPS, losses, is_for_good=good) for good in (False, True))

    assert (last.probes >= first.probes).all()
    assert np.array_equal(last.base_losses, first.base_losses)


def test_a_unit_that_stays_above_half_its_loss_is_censored_at_the_last_probe() -> None:
    losses = np.linspace(2.0, 1.1, 6)[:, None]

    times = learning_times(STEPS, losses)

    assert not times.is_learned[0]
    assert times.probes[0] == len(STEPS)
    assert times.log_times[0] == np.log1p(31)


def test_a_unit_with_a_low_loss_before_training_has_nothing_to_learn() -> None:
    losses = np.array([[KNOWN_LOSS, KNOWN_LOSS + 0.01]] + [[0.01, 0.01]] * 5)

    assert learning_times(STEPS, losses).was_known.tolist() == [True, False]


def test_units_that_were_not_learned_share_the_last_places() -> None:
    assert ranks(times_at([6, 1, 6, 3])).tolist() == [3.5, 1, 3.5, 2]


def test_the_learning_order_has_students_interval_of_the_mean_place() -> None:
    order = learning_order([times_at([1, 2, 3]), times_at([2, 1, 3])], 0.95)

    reach = stats.t.ppf(0.975, 1) * 0.5
    assert [row["rank"] for row in order] == [1.5, 1.5, 3]
    assert order[0]["low"] == max(1.5 - reach, 1)
    assert (order[2]["low"], order[2]["high"]) == (3, 3)


def test_one_training_gives_an_order_without_intervals() -> None:
    (row, *_) = learning_order([times_at([1, 6])], 0.95)

    assert row == {
        "rank": 1.0, "low": None, "high": None, "learned_share": 1.0,
        "step": pytest.approx(1), "step_low": None, "step_high": None,
    }  # fmt: skip


def test_the_time_of_a_unit_is_the_geometric_mean_with_students_interval() -> None:
    (row, _) = learning_order([times_at([2, 1]), times_at([4, 1])], 0.95)

    reach = stats.t.ppf(0.975, 1) * np.log(16 / 4) / 2
    assert row["step"] == pytest.approx(8 - 1)
    assert row["step_high"] == pytest.approx(np.expm1(np.log(8) + reach))
    assert row["step_low"] == 0


def test_a_unit_that_one_training_does_not_learn_has_no_upper_end_of_its_time() -> None:
    (row, _) = learning_order([times_at([2, 1]), times_at([6, 1])], 0.95)

    assert (row["learned_share"], row["step_high"]) == (0.5, None)
    assert row["step_low"] is not None and row["step_low"] < row["step"]


def test_units_that_were_known_take_no_place_from_those_that_were_learned() -> None:
    known = np.array([True, False, False])
    trainings = [replace(times_at(at), was_known=known) for at in ([1, 2, 3], [1, 3, 2], [1, 2, 3])]

    first, *others = learning_order(trainings, 0.95)

    assert set(first.values()) == {None}
    assert [row["rank"] for row in others] == pytest.approx([4 / 3, 5 / 3])
    assert max(row["high"] or 0 for row in others) <= 2


def test_equal_orders_agree_and_opposite_ones_disagree() -> None:
    up, down = times_at([1, 2, 3, 4]), times_at([4, 3, 2, 1])

    same, opposite = rank_agreement(up, up), rank_agreement(up, down)

    assert same is not None and (same.kendall, same.spearman) == (1.0, pytest.approx(1))
    assert opposite is not None and opposite.kendall == -1.0


def test_an_order_of_ties_has_no_agreement() -> None:
    assert rank_agreement(times_at([6, 6, 6]), times_at([1, 2, 3])) is None


def test_the_survival_curve_counts_censored_units_as_at_risk() -> None:
    curve = survival_curve(times_at([1, 2, 6, 6]))

    assert curve["step"] == pytest.approx([1, 3])
    assert curve["unlearned"] == pytest.approx([0.75, 0.5])


def test_strata_hold_equally_many_units() -> None:
    strata = strata_of(np.random.default_rng(0).permutation(30).astype(float))

    assert np.bincount(strata).tolist() == [10, 10, 10]


def test_the_log_rank_statistic_of_independent_units_is_that_of_statsmodels() -> None:
    generator = np.random.default_rng(0)
    is_group, strata = generator.random(200) < 0.4, generator.integers(0, 3, 200)
    probes = np.minimum(generator.integers(1, 7, 200) + (generator.random(200) < 0.4) * is_group, 6)
    times = times_at(probes.tolist())

    found = log_rank(times, is_group, strata, np.arange(200), num_draws=4000)

    expected, _ = survdiff(
        times.probes, times.is_learned.astype(int), is_group.astype(int), strata=strata
    )
    assert abs(found.z) == pytest.approx(np.sqrt(expected), rel=0.15, abs=0.1)


@pytest.mark.parametrize("repeats", [1, 6])
def test_groups_that_are_alike_are_seldom_told_apart_also_when_units_are_repeated(
    repeats: int,
) -> None:
    """Six equal copies of each unit carry no more than one does."""
    p_values = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        probes, is_group = generator.integers(1, 7, 40), generator.random(40) < 0.5
        times = times_at(np.tile(probes, repeats).tolist())
        clusters = np.tile(np.arange(40), repeats)
        strata = np.zeros(40 * repeats, dtype=np.int64)
        found = log_rank(times, np.tile(is_group, repeats), strata, clusters, num_draws=200)
        p_values.append(found.p_value)

    assert np.mean(np.array(p_values) <= 0.05) <= 0.15


def test_a_group_that_learns_earlier_is_found() -> None:
    generator = np.random.default_rng(0)
    early, late = generator.integers(1, 4, 40), generator.integers(3, 7, 40)
    times = times_at([*early, *late])
    is_group = np.arange(80) < 40

    found = log_rank(times, is_group, np.zeros(80, dtype=np.int64), np.arange(80))

    assert found.difference > 0
    assert found.p_value < 1e-4


def test_a_log_rank_test_needs_two_groups() -> None:
    with pytest.raises(AnalysisError, match="both groups"):
        log_rank(times_at([1, 2]), np.ones(2, dtype=bool), np.zeros(2, dtype=int), np.arange(2))


def test_draws_of_clusters_take_whole_clusters() -> None:
    weights = cluster_weights(np.array([4, 4, 9, 2]), num_draws=50, seed=0)

    assert weights[0].tolist() == [1, 1, 1, 1]
    assert np.array_equal(weights[:, 0], weights[:, 1])
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


@given(st.floats(-2, 2), st.floats(-1, 1), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_without_censoring_the_regression_is_least_squares(
    intercept: float, slope: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    design = np.stack([np.ones(30), generator.normal(size=30)], axis=1)
    outcome = design @ [intercept, slope] + 0.3 * generator.normal(size=30)

    fit = censored_regression(outcome, design, np.ones(30, dtype=bool))

    expected = np.linalg.lstsq(design, outcome, rcond=None)[0]
    assert fit.coefficients == pytest.approx(expected, abs=1e-6)


def test_the_regression_sees_through_censoring() -> None:
    """Half of the outcomes are censored; least squares on the others would flatten the slope."""
    generator = np.random.default_rng(0)
    slopes, errors = [], []
    for _ in range(60):
        x = generator.normal(size=200)
        truth = 1 - 0.8 * x + 0.4 * generator.normal(size=200)
        design = np.stack([np.ones(200), x], axis=1)
        fit = censored_regression(np.minimum(truth, 1.0), design, truth < 1.0)
        slopes.append(fit.coefficients[1])
        errors.append(fit.standard_errors[1])

    assert np.mean(slopes) == pytest.approx(-0.8, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.3)


def test_weights_count_as_repeated_observations() -> None:
    generator = np.random.default_rng(1)
    design = np.stack([np.ones(20), generator.normal(size=20)], axis=1)
    outcome, seen = generator.normal(size=20), generator.random(20) < 0.7
    twice = np.r_[np.arange(20), np.arange(5)]

    weighted = censored_regression(outcome, design, seen, np.bincount(twice).astype(float))
    repeated = censored_regression(outcome[twice], design[twice], seen[twice])

    assert weighted.coefficients == pytest.approx(repeated.coefficients)


def test_too_few_learned_units_are_refused() -> None:
    design = np.ones((3, 1))

    with pytest.raises(AnalysisError, match="needs at least 2"):
        censored_regression(np.ones(3), design, np.array([True, False, False]))
