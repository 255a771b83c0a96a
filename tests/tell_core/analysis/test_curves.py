import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.curves import curve_row, score_trainings
from tell_core.analysis.resampling import Resampling, item_weights
from tell_core.errors import AnalysisError
from tests.tell_core.analysis.studies import FAST, flat_point, item_mean, point


@given(st.integers(2, 6), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_the_interval_holds_the_mean(num_seeds: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(num_seeds, 40))

    row = curve_row(point("sft", 1000, scores), FAST)

    assert row["mean"] == pytest.approx(scores.mean())
    assert row["low"] <= row["mean"] <= row["high"]
    assert [entry["score"] for entry in row["seeds"]] == pytest.approx(scores.mean(axis=1).tolist())


def test_the_interval_of_a_mean_score_covers_seeds_and_items() -> None:
    generator = np.random.default_rng(0)
    items, seeds = generator.normal(0, 1, (300, 1, 80)), generator.normal(0, 0.1, (300, 4, 1))

    rows = [curve_row(point("sft", 1000, scores), FAST) for scores in items + seeds]

    assert 0.92 <= np.mean([row["low"] <= 0 <= row["high"] for row in rows]) <= 0.98


def test_the_interval_ends_where_scores_do() -> None:
    scores = np.asarray([[0.0] * 9 + [1.0], [1.0] * 10])

    free = curve_row(point("sft", 1000, scores), FAST)
    row = curve_row(point("sft", 1000, scores), FAST, (0.0, 1.0))

    assert free["high"] > 1.0
    assert free["low"] < 0.0
    assert (row["low"], row["high"]) == (0.0, 1.0)


def test_one_seed_has_no_interval_and_says_why() -> None:
    row = curve_row(point("sft", 1000, np.ones((1, 5))), FAST)

    assert (row["low"], row["high"]) == (None, None)
    assert "one seed" in row["reason"]


def test_the_base_model_needs_no_second_seed() -> None:
    base = point("base", 1000, np.random.default_rng(0).normal(size=(1, 50)))
    object.__setattr__(base, "varies_with_seed", False)

    row = curve_row(base, FAST)

    assert row["low"] < row["mean"] < row["high"]
    assert row["reason"] is None


def test_an_undefined_score_is_null_with_a_reason() -> None:
    row = curve_row(flat_point("sft", 1000, np.nan), FAST)

    assert (row["mean"], row["low"], row["high"]) == (None, None, None)
    assert "not defined" in row["reason"]
    json.dumps(row, allow_nan=False)


def test_a_metric_that_is_no_mean_is_scored_from_its_statistics() -> None:
    weights = item_weights(30, Resampling(num_draws=100))
    statistics = [np.random.default_rng(seed).uniform(1, 2, (30, 2)) for seed in range(3)]

    def ratio(one: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sums = weights @ one
        return sums[:, 0] / sums[:, 1]

    scores, draws = score_trainings(statistics, weights, ratio)

    assert scores == pytest.approx([one[:, 0].sum() / one[:, 1].sum() for one in statistics])
    assert draws.shape == (3, 100)
    assert draws[1] == pytest.approx(ratio(statistics[1], weights))


def test_cells_scored_on_different_numbers_of_items_are_refused() -> None:
    weights = item_weights(5, FAST)

    with pytest.raises(AnalysisError, match="scored on 4 items, others on 5"):
        score_trainings([np.ones((5, 1)), np.ones((4, 1))], weights, item_mean)
