import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tell_core.analysis.leverage import advantage
from tell_core.analysis.power import (
    Noise,
    half_width,
    measured_power,
    power_before_training,
    smallest_difference,
)
from tell_core.analysis.resampling import Resampling
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.model import MetricSpec
from tests.tell_core.analysis.studies import flat_point, point

THOROUGH = Resampling(num_draws=2000)
EXACT_MATCH = build_metric(MetricSpec(name="exact_match"))
LOG_PROBABILITY = build_metric(MetricSpec(name="log_probability"))

sds = st.floats(0.001, 1)
counts = st.integers(2, 50)


@given(sds, sds, counts, counts, st.floats(1.01, 3))
@settings(deadline=None)
def test_more_seeds_more_items_and_less_noise_show_less(
    seed_sd: float, item_sd: float, num_seeds: int, num_items: int, factor: float
) -> None:
    found = smallest_difference(seed_sd, item_sd, num_seeds, num_items)

    assert found is not None and found > 0
    assert smallest_difference(factor * seed_sd, factor * item_sd, num_seeds, num_items) == (
        pytest.approx(factor * found, rel=1e-6)
    )
    assert smallest_difference(seed_sd, item_sd, 2 * num_seeds, 2 * num_items) < found  # type: ignore[operator]


@pytest.mark.parametrize(("num_seeds", "num_items"), [(1, 100), (3, 1), (1, 1)])
def test_one_seed_or_one_item_shows_nothing(num_seeds: int, num_items: int) -> None:
    assert smallest_difference(0.1, 0.1, num_seeds, num_items) is None


@pytest.mark.parametrize(
    ("num_seeds", "seed_sd", "item_sd"),
    [(3, 0.1, 0.2), (3, 0.03, 0.5), (5, 0.03, 0.5), (8, 0.0, 0.5)],
)
def test_the_smallest_difference_is_seen_in_four_of_five_studies(
    num_seeds: int, seed_sd: float, item_sd: float
) -> None:
    num_items = 80
    difference = smallest_difference(seed_sd, item_sd, num_seeds, num_items)
    assert difference is not None
    generator = np.random.default_rng(0)

    def is_seen() -> bool:
        def noise() -> np.ndarray:
            return generator.normal(0, seed_sd, (num_seeds, 1)) + np.zeros((1, num_items))

        own = difference + generator.normal(0, item_sd, num_items)
        tell = point("tell", 100, own + noise(), resampling=THOROUGH)
        low = advantage(tell, [[point("sft", 100, noise(), resampling=THOROUGH)]], THOROUGH).low
        return low is not None and low > 0

    seen = np.mean([is_seen() for _ in range(300)])

    assert seen == pytest.approx(0.8, abs=0.07)


def test_what_was_measured_is_what_was_simulated() -> None:
    generator = np.random.default_rng(0)
    points = [
        point(arm, budget, generator.normal(0, 0.1, (6, 1)) + generator.normal(0, 0.4, (1, 200)))
        for budget in range(100, 2000, 100)
        for arm in ("tell", "sft")
    ]

    found = measured_power(points, 0.95)

    expected = smallest_difference(0.1, 0.4 * 2**0.5, 6, 200)
    rows = found["by_task_budget"]
    assert [row["task_budget_tokens"] for row in rows] == list(range(100, 2000, 100))
    assert np.mean([row["smallest_difference"] for row in rows]) == pytest.approx(expected, rel=0.1)
    assert found["reason"] is None
    assert (found["num_seeds"], found["num_items"], found["power"]) == (6, 200, 0.8)


def test_noise_at_one_budget_says_nothing_of_another() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(2, 4, 50))
    quiet, loud = (
        measured_power(
            [
                point(arm, budget, scale * own)
                for budget, scale in ((100, 1.0), (200, factor))
                for arm, own in zip(("tell", "sft"), noise, strict=True)
            ],
            0.95,
        )["by_task_budget"]
        for factor in (1.0, 600.0)
    )

    assert loud[0] == quiet[0]
    ratio = loud[1]["smallest_difference"] / quiet[1]["smallest_difference"]
    assert ratio == pytest.approx(600)


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 0.01), (False, 0.1)])
def test_of_several_pairs_that_of_the_best_baseline_counts(
    higher_is_better: bool, best: float
) -> None:
    generator = np.random.default_rng(0)
    tell = point("tell", 100, np.zeros((3, 50)), general_budget=5000)
    poor = point("sft", 100, generator.normal(0, 0.1, (3, 50)) - 0.5)
    good = point("sft_matched", 100, generator.normal(0, 0.01, (3, 50)), general_budget=5000)

    found = measured_power([poor, tell, good], 0.95, higher_is_better=higher_is_better)

    alone = measured_power([tell, good if best == 0.01 else poor], 0.95)
    assert found["by_task_budget"] == alone["by_task_budget"]


def test_a_budget_without_a_pair_has_a_reason_of_its_own() -> None:
    generator = np.random.default_rng(0)
    points = [
        point(arm, budget, generator.normal(size=(3, 50)))
        for arm, budget in (("tell", 100), ("sft", 100), ("tell", 200))
    ]

    first, second = measured_power(points, 0.95)["by_task_budget"]

    assert first["smallest_difference"] > 0 and first["reason"] is None
    assert second["smallest_difference"] is None and second["reason"]


@given(st.integers(1, 3), st.sampled_from([0.0, 0.4, float("nan")]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_constant_zero_and_lonely_arms_have_no_measured_power(
    num_seeds: int, score: float, has_sft: bool
) -> None:
    arms = ("tell", "sft") if has_sft else ("tell",)

    found = measured_power([flat_point(arm, 100, score, num_seeds) for arm in arms], 0.95)

    (row,) = found["by_task_budget"]
    assert row["smallest_difference"] is None and row["reason"]
    assert (found["reason"] is None) == (has_sft and num_seeds > 1)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("metric", [EXACT_MATCH, LOG_PROBABILITY])
def test_before_training_the_noise_of_an_earlier_run_is_taken_where_there_is_one(metric) -> None:  # type: ignore[no-untyped-def]
    found = power_before_training(metric, 200, 3, Noise(0.02, 0.4))

    expected = smallest_difference(0.02, 0.4, 3, 200)
    assert found["smallest_difference"] == pytest.approx(expected)
    assert found["reason"] is None and "earlier run" in found["assumption"]


@given(
    noise=st.builds(Noise, st.floats(0, 5), st.floats(0, 5)),
    num_seeds=st.integers(2, 20),
    num_items=st.integers(2, 5000),
)
def test_more_seeds_and_items_narrow_the_expected_interval(
    noise: Noise, num_seeds: int, num_items: int
) -> None:
    width = half_width(noise, num_seeds, num_items, 0.95)

    assert width >= half_width(noise, num_seeds + 1, num_items, 0.95)
    assert width >= half_width(noise, num_seeds, num_items + 1, 0.95)
    assert half_width(noise, 1, num_items, 0.95) is None
    assert half_width(noise, num_seeds, 1, 0.95) is None


def test_the_expected_interval_is_that_of_student_over_seeds_and_of_many_items() -> None:
    seeds_alone = half_width(Noise(1.0, 0.0), 3, 100, 0.95)
    items_alone = half_width(Noise(0.0, 1.0), 3, 10_000, 0.95)

    assert seeds_alone == pytest.approx(3.513, abs=1e-3)  # t(2) = 4.303, times sqrt(2 / 3)
    assert items_alone == pytest.approx(0.0196, abs=1e-4)


def test_the_expected_interval_is_what_simulated_pairs_of_arms_show() -> None:
    rng = np.random.default_rng(0)
    noise, num_seeds, num_items = Noise(0.05, 0.4), 5, 300
    widths = []
    for _ in range(200):
        seeds = rng.normal(0, noise.seed_sd, (2, num_seeds))
        differences = seeds[0] - seeds[1]
        items = rng.normal(0, noise.item_difference_sd, num_items)
        from_seeds = stats.t.ppf(0.975, num_seeds - 1) * differences.std(ddof=1) / num_seeds**0.5
        widths.append(np.hypot(from_seeds, 1.96 * items.std(ddof=1) / num_items**0.5))

    assert half_width(noise, num_seeds, num_items, 0.95) == pytest.approx(
        np.sqrt(np.mean(np.square(widths))), rel=0.05
    )


def test_a_score_that_is_no_mean_of_items_is_said_to_be_taken_for_one() -> None:
    found = power_before_training(build_metric(MetricSpec(name="slot_f1")), 200, 3)

    assert found["smallest_difference"] > 0 and "near their mean" in found["assumption"]


def test_without_seed_noise_it_is_said_to_be_left_out_and_no_bound() -> None:
    found = power_before_training(EXACT_MATCH, 200, 3)

    expected = smallest_difference(0.0, 0.5**0.5, 3, 200)
    assert found["smallest_difference"] == pytest.approx(expected)
    assert "seed noise unknown and left out" in found["assumption"]
    assert "which paired arms seldom do" in found["assumption"]
    assert "at least" not in found["assumption"]


@pytest.mark.parametrize(
    ("metric", "num_items", "num_seeds", "reason"),
    [
        (LOG_PROBABILITY, 200, 3, "no limits"),
        (build_metric(MetricSpec(name="macro_f1")), 200, 3, "no mean over items"),
        (EXACT_MATCH, 200, 1, "one seed"),
        (EXACT_MATCH, 1, 3, "one item"),
    ],
)
def test_where_nothing_can_be_said_there_is_a_reason(
    metric, num_items: int, num_seeds: int, reason: str
) -> None:  # type: ignore[no-untyped-def]
    found = power_before_training(metric, num_items, num_seeds)

    assert found["smallest_difference"] is None and reason in found["reason"]
