import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.curves import CurvePoint
from tell_core.analysis.price import price_rows
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.model import MetricSpec
from tests.tell_core.analysis.studies import FAST, flat_point, point

GENERAL = build_metric(MetricSpec(name="general_log_probability"))


def test_the_change_is_paired_by_item_and_positive_where_better_kept() -> None:
    generator = np.random.default_rng(0)
    items = generator.normal(0, 5, (1, 60))
    base = _base(items)
    worse = point("sft", 100, items - 0.5 + generator.normal(0, 0.05, (3, 60)))

    (row,) = price_rows(GENERAL, [base, worse], FAST)

    assert row["change"] == pytest.approx(-0.5, abs=0.03)
    assert -0.7 < row["low"] < row["change"] < row["high"] < -0.3
    assert (row["metric"], row["arm"], row["reason"]) == (GENERAL.name, "sft", None)


def test_where_lower_is_better_the_change_is_turned_round() -> None:
    class Perplexity(type(GENERAL)):  # type: ignore[misc]
        higher_is_better = False

    items = np.random.default_rng(0).normal(size=(1, 60))
    points = [_base(items), point("sft", 100, items + np.array([[0.4], [0.5], [0.6]]))]

    (row,) = price_rows(Perplexity(MetricSpec(name=GENERAL.name)), points, FAST)

    assert row["change"] == pytest.approx(-0.5)
    assert row["low"] < -0.5 < row["high"]


def test_the_interval_covers_at_least_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)

    def covers() -> bool:
        items = generator.normal(size=(1, 50))
        own = generator.normal(-0.3, 0.5, (1, 50)) + generator.normal(0, 0.1, (3, 1))
        (row,) = price_rows(GENERAL, [_base(items), point("sft", 100, items + own)], FAST)
        return bool(row["low"] <= -0.3 <= row["high"])

    assert np.mean([covers() for _ in range(300)]) >= 0.92


@given(st.integers(1, 3), st.sampled_from([0.0, -0.4, float("nan")]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_constant_zero_single_seed_and_missing_scores_have_no_interval_but_a_reason(
    num_seeds: int, score: float, has_base: bool
) -> None:
    base = [_base(np.full((1, 10), score))] if has_base else []

    (row,) = price_rows(GENERAL, [*base, flat_point("sft", 100, score, num_seeds)], FAST)

    assert row["low"] is None and row["high"] is None
    assert row["reason"]
    json.dumps(row, allow_nan=False)


def test_one_seed_gives_a_change_without_an_interval() -> None:
    items = np.random.default_rng(0).normal(size=(1, 60))

    (row,) = price_rows(GENERAL, [_base(items), point("sft", 100, items + 0.2)], FAST)

    assert row["change"] == pytest.approx(0.2) and row["low"] is None
    assert "one seed" in row["reason"]


def _base(scores: np.ndarray) -> CurvePoint:
    return replace(point("base", 0, scores), task_budget_tokens=None, varies_with_seed=False)
