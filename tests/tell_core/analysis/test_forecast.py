import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.forecast import (
    HORIZON_FACTOR,
    MIN_EFFECTIVE_DRAWS,
    MeasuredCurve,
    Target,
    forecast_curve,
    forecast_metric,
    tokens_to_reach,
)
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.model import AnalysisSpec, MetricSpec
from tests.tell_core.analysis.calibration import AHEAD, BACKTESTS, FIRST_SEED, covered
from tests.tell_core.analysis.growing import FAMILIES, NUM_MEASURED, simulate

ANALYSIS = AnalysisSpec(primary_metric="exact_match")
EXACT_MATCH = build_metric(MetricSpec(name="exact_match"))


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
@settings(deadline=None)
def test_a_higher_score_never_takes_fewer_tokens(
    scores: list[float], target: float, more: float
) -> None:
    grid = 100 * 2.0 ** np.arange(len(scores))
    expected = np.array([scores])

    less, greater = (tokens_to_reach(grid, expected, at)[0] for at in (target, target + more))

    assert grid[0] <= less <= greater
    assert np.isinf(greater) == (max(scores) < target + more)


def test_tokens_to_reach_lie_on_the_straight_line_in_log_tokens() -> None:
    needed = tokens_to_reach(np.array([100.0, 400.0]), np.array([[0.2, 0.6]]), 0.4)

    assert needed == pytest.approx([200.0])


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.4, math.nan]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_hopeless_curves_are_undefined_with_a_reason(
    num_budgets: int, num_seeds: int, score: float, is_rising: bool
) -> None:
    scores = np.full((num_seeds, num_budgets), score)
    if is_rising:
        scores += 0.1 * np.arange(num_budgets)
    is_hopeful = is_rising and num_budgets >= 3 and num_seeds > 1 and math.isfinite(score)

    entry = _forecast(scores, targets=[Target("it", 0.9)])

    assert (entry["status"] == "ok") == is_hopeful
    if not is_hopeful:
        assert entry["reason"]
        assert not (entry["gains"] or entry["band"] or entry["backtests"])
        assert entry["targets"][0]["status"] == "undefined"
        assert entry["targets"][0]["more_tokens"] is None
    json.dumps(entry, allow_nan=False)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (np.zeros((3, 4)), "all-zero"),
        (np.full((3, 4), 0.3), "constant"),
        (np.array([[0.1, 0.2, 0.3]]), "one seed"),
        (np.array([[0.1, 0.2], [0.1, 0.3]]), "fewer than 3"),
        (np.array([[0.1, 0.2, np.nan], [0.1, 0.2, 0.3]]), "not defined"),
    ],
)
def test_the_reason_says_what_is_missing(scores: np.ndarray, reason: str) -> None:
    assert reason in _forecast(scores)["reason"]


@given(
    st.lists(st.floats(0.02, 0.1), min_size=2, max_size=4),
    st.floats(0.1, 0.3),
    st.integers(2, 4),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_curve_that_falls_beyond_its_noise_is_refused(
    rises: list[float], fall: float, num_seeds: int, is_turned: bool
) -> None:
    means = 0.5 + np.cumsum([0.0, *rises, -fall])
    noise = np.random.default_rng(0).normal(0, 0.003, (num_seeds, len(means)))

    entry = _forecast(means + noise, targets=[Target("it", 0.5)], sign=-1.0 if is_turned else 1.0)

    assert entry["status"] == "undefined" and entry["effective_draws"] is None
    assert ("rises, which is worse" if is_turned else "falls with more") in entry["reason"]
    assert f"that at {1000 * 2 ** len(rises):,} by more than its noise" in entry["reason"]
    assert not (entry["gains"] or entry["band"] or entry["backtests"])
    assert entry["targets"][0]["reason"] == entry["reason"]


def test_a_fall_within_the_noise_is_no_fall() -> None:
    scores = np.array([0.3, 0.5, 0.6, 0.6]) + np.array([[0.03, -0.03, 0.04, -0.05],
                                                       [-0.02, 0.03, -0.03, 0.03],
                                                       [0.0, -0.02, 0.04, -0.03]])  # fmt: skip

    entry = _forecast(scores)

    assert scores[:, -1].mean() < scores[:, -2].mean()
    assert entry["status"] == "ok" and entry["effective_draws"] >= MIN_EFFECTIVE_DRAWS


def test_few_plateaus_are_taken_for_falls() -> None:
    truth = np.array([0.3, 0.5, 0.6, 0.6, 0.6])
    draws = np.random.default_rng(0).normal(0, 0.02, (300, 3, 5))

    refused = [_curve(truth + noise).why_undefined(5) is not None for noise in draws]

    assert np.mean(refused) <= 0.06


def test_backtests_leave_out_budgets_that_only_look_like_a_fall() -> None:
    scores = np.array([0.3, 0.5, 0.4, 0.6, 0.7]) + np.array([[-0.002], [0.0], [0.002]])
    scores += np.random.default_rng(0).normal(0, 0.002, scores.shape)

    assert _curve(scores).why_undefined(3) is not None
    assert _curve(scores).why_undefined(5) is None
    assert all(len(row["fitted_on"]) > 3 for row in _forecast(scores)["backtests"])


def test_scores_that_no_growth_curve_comes_near_are_refused(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("tell_core.analysis.forecast.MIN_EFFECTIVE_DRAWS", 1e6)

    entry = _forecast(simulate("probit", 0).scores[:, :NUM_MEASURED], targets=[Target("it", 0.9)])

    assert entry["status"] == entry["targets"][0]["status"] == "undefined"
    assert 0 < entry["effective_draws"] < 1e6
    assert "worth" in entry["reason"] and not entry["backtests"]


@pytest.mark.parametrize("noise", [0.02, 0.002, 0.0002])
def test_other_draws_give_nearly_the_same_forecast_of_eight_budgets(noise: float) -> None:
    tokens = 1000 * 2.0 ** np.arange(8)
    truth = 0.9 / (1 + (tokens / 60_000) ** -1.2)
    scores = truth + np.random.default_rng(1).normal(0, noise, (3, 8))

    first, second = (_forecast(scores, targets=[Target("it", 0.68)], seed=seed) for seed in (0, 1))

    assert first["status"] == second["status"] == "ok"
    assert min(entry["effective_draws"] for entry in (first, second)) >= MIN_EFFECTIVE_DRAWS
    one, other = first["targets"][0], second["targets"][0]
    for end in ("low", "more_tokens", "high"):
        assert one[end] == pytest.approx(other[end], rel=0.15), end
    for row, again in zip(first["gains"], second["gains"], strict=True):
        assert row["high"] - row["low"] == pytest.approx(again["high"] - again["low"], rel=0.15)


def test_what_was_measured_needs_no_more_whatever_the_curves_say() -> None:
    truth = np.array([0.3, 0.5, 0.58, 0.6, 0.6])
    scores = truth + np.random.default_rng(3).normal(0, 0.02, (3, 5))
    best = float(scores.mean(axis=0).max())

    safe, lucky = _forecast(scores, targets=[Target("a", 0.45), Target("b", best)])["targets"]

    for target in (safe, lucky):
        assert (target["status"], target["more_tokens"], target["low"]) == ("reached", 0.0, 0.0)
    assert safe["high"] == 0.0 and safe["reason"] is None
    assert lucky["high"] is None or lucky["high"] > 0
    assert "noise" in lucky["reason"]


def test_a_forecast_is_complete_ordered_and_inside_the_limits() -> None:
    entry = _forecast(simulate("probit", 0).scores[:, :NUM_MEASURED])

    assert entry["status"] == "ok" and entry["reason"] is None
    assert [row["task_tokens"] for row in entry["gains"]] == [24_000, 32_000, 64_000]
    assert [row["more_tokens"] for row in entry["gains"]] == [8000, 16_000, 48_000]
    assert entry["band"][0]["task_tokens"] == pytest.approx(1000)
    assert entry["band"][-1]["task_tokens"] == pytest.approx(16_000 * HORIZON_FACTOR)
    for row in [*entry["band"], *entry["gains"], *entry["backtests"]]:
        assert 0 <= row["low"] <= row["score"] <= row["high"] <= 1


def test_backtests_hold_out_the_one_and_the_two_largest_budgets() -> None:
    entry = _forecast(simulate("probit", 0).scores[:, :NUM_MEASURED])

    tested = [(len(row["fitted_on"]), row["task_tokens"]) for row in entry["backtests"]]
    assert tested == [(4, 16_000), (3, 8000), (3, 16_000)]
    for row in entry["backtests"]:
        assert row["is_covered"] == (row["low"] <= row["observed"] <= row["high"])


def test_budgets_beyond_the_horizon_of_the_smaller_ones_are_not_backtested() -> None:
    scores = simulate("probit", 0).scores[:, :NUM_MEASURED]

    entry = _forecast(scores, tokens=1000 * 8.0 ** np.arange(NUM_MEASURED))

    assert entry["status"] == "ok" and entry["backtests"] == []


def test_the_three_answers_to_how_much_more() -> None:
    tokens = 1000 * 2.0 ** np.arange(5)
    truth = 1 / (1 + (tokens / 8000) ** -1.5)
    scores = truth + np.array([[-0.002], [0.0], [0.002]])
    targets = [Target("low", 0.3), Target("next", 0.8), Target("all", 0.999)]

    low, following, everything = _forecast(scores, targets=targets)["targets"]

    assert (low["status"], low["more_tokens"], low["tokens"]) == ("reached", 0.0, 8000.0)
    needed = 8000 * (0.8 / 0.2) ** (1 / 1.5) - 16_000
    assert following["status"] == "needs_more"
    assert following["low"] <= needed <= following["high"]
    assert following["more_tokens"] == pytest.approx(needed, rel=0.3)
    assert everything["status"] == "beyond_horizon"
    assert everything["tokens"] is None and everything["high"] is None


def test_where_lower_is_better_all_is_turned_round() -> None:
    class ErrorRate(type(EXACT_MATCH)):  # type: ignore[misc]
        higher_is_better = False

    turned = ErrorRate(MetricSpec(name="exact_match"))
    scores = simulate("gompertz", 2).scores[:, :NUM_MEASURED]

    one = forecast_metric(EXACT_MATCH, _points(scores), ANALYSIS)["curves"][0]
    other = forecast_metric(turned, _points(1 - scores), ANALYSIS)["curves"][0]

    for row, mirrored in zip(one["gains"], other["gains"], strict=True):
        assert mirrored["low"] == pytest.approx(1 - row["high"], abs=0.02)
        assert mirrored["high"] == pytest.approx(1 - row["low"], abs=0.02)
    assert other["gains"][0]["score"] < 0.5 < one["gains"][0]["score"]


def test_sft_is_asked_for_what_tell_reaches_and_tell_for_the_best_of_all() -> None:
    scores = simulate("gompertz", 2).scores[:, :NUM_MEASURED]
    points = [
        *_points(0.8 * scores, "tell", 9000),
        *_points(0.7 * scores, "sft"),
        *_points(0.9 * scores, "sft_matched", 9000),
        *_points(0.9 * scores, "general_only", 9000),
    ]
    analysis = ANALYSIS.model_copy(update={"target_score": 0.95})

    tell, sft, matched = forecast_metric(EXACT_MATCH, points, analysis)["curves"]

    assert [curve["arm"] for curve in (tell, sft, matched)] == ["tell", "sft", "sft_matched"]
    for curve in (tell, sft, matched):
        assert curve["targets"][0]["label"] == "a score of 0.95"
    label = "what TELL reaches with 16,000 task tokens"
    assert [curve["targets"][1]["label"] for curve in (sft, matched)] == [label, label]
    assert sft["targets"][1]["score"] == pytest.approx(0.8 * scores[:, -1].mean())
    assert tell["targets"][1]["label"] == (
        "the best score of any arm (SFT with as many steps with 16,000 task tokens)"
    )


def test_a_target_score_is_about_the_primary_metric_alone() -> None:
    analysis = AnalysisSpec(primary_metric="log_probability", target_score=-0.1)

    found = forecast_metric(EXACT_MATCH, _points(simulate("quanta", 1).scores), analysis)

    assert found["curves"][0]["targets"] == []


def test_calibration_counts_the_backtests_of_all_curves() -> None:
    points = [
        *_points(simulate("quanta", 1).scores, "sft"),
        *_points(simulate("probit", 1).scores, "tell", 9000),
    ]

    found = forecast_metric(EXACT_MATCH, points, ANALYSIS)

    tests = [row for curve in found["curves"] for row in curve["backtests"]]
    assert found["calibration"]["num_backtests"] == len(tests) == 6
    covered = sum(row["is_covered"] for row in tests)
    assert found["calibration"]["num_covered"] == covered
    assert found["calibration"]["coverage"] == pytest.approx(covered / 6)


def test_without_a_backtest_coverage_is_unknown() -> None:
    found = forecast_metric(EXACT_MATCH, _points(simulate("quanta", 1).scores[:, :3]), ANALYSIS)

    assert found["calibration"]["num_backtests"] == 0
    assert found["calibration"]["coverage"] is None


def test_a_curve_takes_less_than_a_second() -> None:
    scores = simulate("quanta_loss", 0).scores[:, :NUM_MEASURED]
    _forecast(scores, limits=(-np.inf, 0.0))
    started = time.process_time()

    _forecast(scores, limits=(-np.inf, 0.0))

    assert time.process_time() - started < 1


def test_intervals_cover_backtests_of_strange_curves_about_as_often_as_they_say() -> None:
    found = [covered(family, range(100, 103)) for family in FAMILIES]

    assert 0.70 <= np.mean([one for each in found for one in _backtests(each)]) <= 0.96


@pytest.mark.slow
def test_intervals_cover_840_backtests_of_280_strange_curves() -> None:
    found = {family: covered(family, range(FIRST_SEED, FIRST_SEED + 40)) for family in FAMILIES}

    shares = {family: np.mean(_backtests(each)) for family, each in found.items()}
    assert 0.75 <= np.mean(list(shares.values())) <= 0.90
    assert min(shares.values()) >= 0.65
    assert np.mean([one for each in found.values() for at in AHEAD for one in each[at]]) >= 0.75


def _backtests(found: dict[str, list[bool]]) -> list[bool]:
    return [one for name in BACKTESTS for one in found[name]]


def _forecast(
    scores: np.ndarray,
    *,
    targets: list[Target] | None = None,
    tokens: np.ndarray | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    sign: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    curve = _curve(scores, tokens, limits, sign)
    return forecast_curve(curve, targets or [], ANALYSIS.model_copy(update={"seed": seed}))


def _curve(
    scores: np.ndarray,
    tokens: np.ndarray | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    sign: float = 1.0,
) -> MeasuredCurve:
    budgets = 1000 * 2.0 ** np.arange(scores.shape[1]) if tokens is None else tokens
    return MeasuredCurve("sft", None, budgets, scores, limits, sign, 0.0)


def _points(
    scores: np.ndarray, arm: str = "sft", general_budget: int | None = None
) -> list[CurvePoint]:
    return [
        CurvePoint(
            arm=arm,
            task_budget_tokens=1000 * 2**place,
            general_budget_tokens=general_budget,
            task_tokens=np.full(len(scores), 1000.0 * 2**place),
            seeds=tuple(range(len(scores))),
            scores=column,
            item_draws=np.repeat(column[:, None], 2, axis=1),
            num_items=100,
        )
        for place, column in enumerate(scores.T)
    ]
