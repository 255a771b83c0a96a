import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.interpolate import PchipInterpolator
from sklearn.isotonic import IsotonicRegression

from tell_core.analysis.leverage import (
    Bracket,
    crossing,
    isotonic,
    leverage_ratio,
    smallest,
    tokens_needed,
)
from tell_core.analysis.resampling import Resampling
from tests.tell_core.analysis.studies import FAST, Study, flat_point, point

scores_of_curves = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8),
    elements=st.floats(-5, 5).map(lambda value: round(value, 3)),
)


@given(scores_of_curves)
@settings(deadline=None)
def test_isotonic_agrees_with_scikit_learn(scores: np.ndarray) -> None:
    places = np.arange(scores.shape[1])

    fitted = isotonic(scores)

    for row, expected in zip(fitted, scores, strict=True):
        reference = IsotonicRegression().fit_transform(places, expected)
        assert np.allclose(row, reference, atol=1e-9)


@given(scores_of_curves, st.floats(-5, 5))
@settings(deadline=None)
def test_needed_tokens_stay_inside_the_measured_budgets_or_are_bounds(
    scores: np.ndarray, target: float
) -> None:
    tokens = 100.0 * 2.0 ** np.arange(scores.shape[1])

    lower, upper = tokens_needed(tokens, scores, np.full(len(scores), target))

    fitted = isotonic(scores)
    above, below = fitted[:, -1] < target, fitted[:, 0] >= target
    assert (upper[above] == np.inf).all() and (lower[above] == tokens[-1]).all()
    assert (lower[below] == 0).all() and (upper[below] == tokens[0]).all()
    inside = ~above & ~below
    assert (lower[inside] == upper[inside]).all()
    assert (lower[inside] >= tokens[0]).all() and (lower[inside] <= tokens[-1] * (1 + 1e-9)).all()


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=6), st.floats(0.02, 0.98))
@settings(deadline=None)
def test_needed_tokens_invert_the_monotone_cubic_curve(rises: list[float], share: float) -> None:
    scores = np.cumsum(rises)
    tokens = 500.0 * 3.0 ** np.arange(len(scores))
    target = scores[0] + share * (scores[-1] - scores[0])

    needed = tokens_needed(tokens, scores[None], np.array([target])).lower[0]

    curve = PchipInterpolator(np.log(tokens), scores)
    assert curve(np.log(needed)) == pytest.approx(target, abs=1e-6)


@given(scores_of_curves, st.floats(-5, 5), st.floats(0, 3))
@settings(deadline=None)
def test_a_higher_score_never_needs_fewer_tokens(
    scores: np.ndarray, target: float, more: float
) -> None:
    tokens = 100.0 * 2.0 ** np.arange(scores.shape[1])
    low, high = np.full(len(scores), target), np.full(len(scores), target + more)

    less, greater = tokens_needed(tokens, scores, low), tokens_needed(tokens, scores, high)

    assert (greater.lower >= less.lower - 1e-9).all() and (greater.upper >= less.upper - 1e-9).all()


def test_the_best_of_two_curves_needs_the_tokens_of_the_first_to_arrive() -> None:
    one = Bracket(np.array([3.0, 8.0, 8.0]), np.array([3.0, np.inf, np.inf]))
    other = Bracket(np.array([2.0, 5.0, 4.0]), np.array([2.0, 5.0, np.inf]))

    best = smallest([one, other])

    assert best.lower.tolist() == [2.0, 5.0, 8.0]
    assert best.upper.tolist() == [2.0, 5.0, np.inf]


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("is_binary", [False, True])
def test_a_simulated_leverage_of_five_is_found_and_covered(num_seeds: int, is_binary: bool) -> None:
    study = Study(num_seeds=num_seeds, is_binary=is_binary)

    estimates = [leverage_ratio(*_against(study, seed), FAST) for seed in range(60)]

    ratios = [estimate.ratio for estimate in estimates if estimate.ratio is not None]
    assert len(ratios) >= 59
    assert np.median(ratios) == pytest.approx(5, rel=0.15)
    assert np.mean([_covers(estimate, 5.0) for estimate in estimates]) >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("seed_sd", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("spacing", [2.0, 3.0, 4.0])
def test_coverage_holds_over_seed_noise_and_budget_spacing(
    num_seeds: int, is_binary: bool, seed_sd: float, spacing: float
) -> None:
    study = Study(num_seeds=num_seeds, is_binary=is_binary, seed_sd=seed_sd, spacing=spacing)

    estimates = [leverage_ratio(*_against(study, seed), FAST) for seed in range(200)]

    ratios = [estimate.ratio or np.inf for estimate in estimates]
    assert np.median(ratios) == pytest.approx(5, rel=0.15)
    assert np.mean([_covers(estimate, 5.0) for estimate in estimates]) >= 0.90


def test_a_score_sft_never_reaches_is_a_lower_bound() -> None:
    tell, sft = Study(ratio=3000.0, seed_sd=0.05).simulate(0)

    estimate = leverage_ratio(tell, [sft], FAST)

    assert (estimate.censored, estimate.ratio, estimate.high) == ("above", None, None)
    assert estimate.bound == pytest.approx(3**4)
    assert estimate.low == pytest.approx(3**4)
    assert estimate.sft_equivalent_tokens == pytest.approx(1000 * 3**5)


def test_a_score_sft_has_at_its_smallest_budget_is_an_upper_bound() -> None:
    tell, sft = Study(ratio=0.02, seed_sd=0.05).simulate(0)

    estimate = leverage_ratio(tell, [sft], FAST)

    assert (estimate.censored, estimate.ratio, estimate.low) == ("below", None, None)
    assert estimate.bound == pytest.approx(1 / 3)
    assert estimate.high == pytest.approx(1 / 3)


def test_infinite_draws_are_kept() -> None:
    study = Study(ratio=60.0, seed_sd=0.6, num_seeds=3)

    estimate = leverage_ratio(*_against(study, 0), FAST)

    assert estimate.high is None
    assert estimate.low is not None


def test_one_seed_gives_a_point_estimate_but_no_interval() -> None:
    estimate = leverage_ratio(*_against(Study(num_seeds=1, seed_sd=0.0), 0), FAST)

    assert (estimate.censored, estimate.low, estimate.high) == ("undefined", None, None)
    assert estimate.ratio == pytest.approx(5, rel=0.3)
    assert "one seed" in str(estimate.reason)
    assert estimate.advantage.low is None


@pytest.mark.parametrize(
    ("tell", "sft", "reason"),
    [
        (0.5, [0.5, 0.5, 0.5], "constant"),
        (0.0, [0.0, 0.0, 0.3], "all-zero"),
        (np.nan, [0.1, 0.2, 0.3], "not defined"),
        (0.5, [0.1, np.nan, 0.6], "not defined"),
        (0.5, [0.4], "fewer than two"),
    ],
)
def test_hopeless_cases_are_undefined_with_a_reason(
    tell: float, sft: list[float], reason: str
) -> None:
    curve = [flat_point("sft", 100 * 3**place, score) for place, score in enumerate(sft)]

    estimate = leverage_ratio(flat_point("tell", 100, tell), [curve], FAST)

    assert (estimate.censored, estimate.ratio) == ("undefined", None)
    assert reason in str(estimate.reason)
    json.dumps(estimate.as_json(), allow_nan=False)


@given(
    st.sampled_from(["constant", "zero", "one seed", "never reached", "reached at once"]),
    st.integers(2, 5),
    st.integers(2, 4),
    st.floats(0.1, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_made_up_where_nothing_can_be_known(
    case: str, num_budgets: int, num_seeds: int, score: float
) -> None:
    tell, sft = {
        "constant": (score, [score] * num_budgets),
        "zero": (0.0, [0.0] * num_budgets),
        "never reached": (score + 0.1, [score] * num_budgets),
        "reached at once": (score - 0.1, [score] * num_budgets),
        "one seed": (score, [score + 0.1 * place for place in range(num_budgets)]),
    }[case]
    seeds = 1 if case == "one seed" else num_seeds
    curve = [flat_point("sft", 100 * 2**at, value, seeds) for at, value in enumerate(sft)]

    found = leverage_ratio(flat_point("tell", 400, tell, seeds), [curve], FAST)

    expected = {"never reached": "above", "reached at once": "below"}
    assert found.censored == expected.get(case, "undefined")
    assert found.reason
    assert found.ratio is None or case == "one seed"
    assert found.high is None or case == "reached at once"
    assert found.low is None or case == "never reached"


def test_budgets_that_lack_a_seed_of_tell_are_left_out() -> None:
    tell, sft = Study(num_seeds=4).simulate(0)
    lacking = [*sft[:2], sft[2].select((0, 1, 3)), *sft[3:]]

    found = leverage_ratio(tell, [lacking], FAST)

    assert found.num_seeds == 4
    assert found == leverage_ratio(tell, [[*sft[:2], *sft[3:]]], FAST)


def test_seeds_that_too_many_budgets_lack_are_left_out() -> None:
    tell, sft = Study(num_seeds=4).simulate(0)
    lacking = [sft[0], *(point.select((0, 1, 3)) for point in sft[1:])]

    assert leverage_ratio(tell, [lacking], FAST).num_seeds == 3


def test_the_advantage_has_a_p_value_that_agrees_with_its_interval() -> None:
    for seed in range(20):
        tell, sft = Study(ratio=1.3, seed_sd=0.05).simulate(seed)

        gain = leverage_ratio(tell, [sft], FAST).advantage

        assert gain.low is not None and gain.high is not None and gain.p_value is not None
        assert (gain.p_value <= 0.05) == (gain.low > 0 or gain.high < 0)


def test_no_seed_in_common_is_undefined() -> None:
    tell, sft = Study(num_seeds=4).simulate(0)

    estimate = leverage_ratio(tell.select((0, 1)), [[p.select((2, 3)) for p in sft]], FAST)

    assert (estimate.censored, estimate.num_seeds) == ("undefined", 0)


def test_budgets_that_used_up_the_pool_count_once() -> None:
    curve = [flat_point("sft", tokens, score) for tokens, score in ((100, 0.1), (900, 0.8))]
    twin = flat_point("sft", 900, 0.9)

    estimate = leverage_ratio(flat_point("tell", 100, 0.5), [[*curve, twin]], FAST)

    alone = [curve[0], flat_point("sft", 900, 0.85)]
    expected = leverage_ratio(flat_point("tell", 100, 0.5), [alone], FAST)
    assert estimate.ratio == pytest.approx(expected.ratio)


def test_lower_is_better_mirrors_higher_is_better() -> None:
    tell, sft = Study().simulate(0)
    tell_rate, sft_rate = _negated(tell), [_negated(one) for one in sft]

    plain = leverage_ratio(tell, [sft], FAST)
    turned = leverage_ratio(tell_rate, [sft_rate], FAST, higher_is_better=False)

    assert turned.ratio == plain.ratio
    assert (turned.low, turned.high) == (plain.low, plain.high)
    assert turned.advantage == plain.advantage


def test_leverage_against_the_best_is_the_smaller_one() -> None:
    tell, sft = Study().simulate(0)
    _, better = Study().simulate(1)
    better = [one.select(one.seeds) for one in better]
    for one in better:
        one.scores[:] += 0.2
        one.item_draws[:] += 0.2

    each = [leverage_ratio(tell, [curve], FAST) for curve in (sft, better)]
    best = leverage_ratio(tell, [sft, better], FAST)

    assert best.ratio == min(one.ratio for one in each if one.ratio is not None)
    assert best.advantage.difference == min(one.advantage.difference or 9 for one in each)


def test_the_advantage_is_the_paired_difference_at_the_same_budget() -> None:
    tell, sft = Study(seed_sd=0.05).simulate(0)

    gain = leverage_ratio(tell, [sft], FAST).advantage

    assert gain.difference == pytest.approx(tell.scores.mean() - sft[1].scores.mean())
    assert gain.low is not None and gain.high is not None and 0 < gain.low < gain.high


def test_without_sft_at_that_budget_there_is_no_advantage_but_leverage() -> None:
    tell, sft = Study(seed_sd=0.05).simulate(0)

    estimate = leverage_ratio(tell, [[sft[0], *sft[2:]]], FAST)

    assert estimate.ratio == pytest.approx(5, rel=0.5)
    assert estimate.advantage.difference is None


def test_crossing_names_the_last_budget_above_one_and_the_first_below() -> None:
    rows = [
        {"task_budget_tokens": 1000, "low": 2.0, "high": 9.0},
        {"task_budget_tokens": 2000, "low": 1.1, "high": None},
        {"task_budget_tokens": 4000, "low": 0.6, "high": 1.4},
        {"task_budget_tokens": 8000, "low": None, "high": 0.8},
        {"task_budget_tokens": 9000, "low": None, "high": None},
    ]

    assert crossing(rows) == {"largest_budget_above_one": 2000, "smallest_budget_below_one": 8000}
    assert set(crossing([]).values()) == {None}


def test_two_thousand_draws_take_less_than_five_seconds() -> None:
    thorough = Resampling(num_draws=2000)
    generator = np.random.default_rng(0)
    started = time.perf_counter()

    sft = [
        point("sft", 1000 * 3**place, generator.normal(place, 1, (5, 300)), resampling=thorough)
        for place in range(6)
    ]
    tell = point("tell", 3000, generator.normal(2.5, 1, (5, 300)), resampling=thorough)
    leverage_ratio(tell, [sft], thorough)

    assert time.perf_counter() - started < 5


def _against(study: Study, seed: int):  # type: ignore[no-untyped-def]
    tell, sft = study.simulate(seed)
    return tell, [sft]


def _covers(estimate, ratio: float) -> bool:  # type: ignore[no-untyped-def]
    return (estimate.low or 0) <= ratio <= (estimate.high or np.inf)


def _negated(one):  # type: ignore[no-untyped-def]
    turned = one.select(one.seeds)
    turned.scores[:] *= -1
    turned.item_draws[:] *= -1
    return turned
