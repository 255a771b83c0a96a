"""Promotion: when one model beats another on the same items, and how often that is wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.resampling import Resampling
from tell_core.errors import InputError
from tell_core.evaluation.metrics import build_metric
from tell_core.promotion import compare_paired, compare_unpaired, same_items
from tell_core.spec.model import MetricSpec

METRIC = build_metric(MetricSpec(name="exact_match"))
FEW = Resampling(num_draws=300)
SCORES = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=30)


def rows(values, first: int = 0):
    return [
        {"item": f"{first + index:04d}", "stats": {METRIC.name: [float(value)]}}
        for index, value in enumerate(values)
    ]


@given(SCORES)
def test_no_model_beats_itself(values):
    compared = compare_paired(METRIC, rows(values), rows(values), FEW)

    assert compared.difference == 0
    assert not compared.is_better
    assert not compared.is_worse


@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_items_changes_nothing(values, random):
    others = rows([1 - value for value in values])
    shuffled = random.sample(others, len(others))

    first = compare_paired(METRIC, rows(values), others, FEW)

    assert compare_paired(METRIC, rows(values), shuffled, FEW) == first


@given(SCORES, SCORES)
def test_what_beats_another_is_beaten_the_other_way_round(values, others):
    size = min(len(values), len(others))
    left, right = rows(values[:size]), rows(others[:size])

    there, back = compare_paired(METRIC, left, right, FEW), compare_paired(METRIC, right, left, FEW)

    assert there.difference == pytest.approx(-back.difference)
    assert there.is_better == back.is_worse


@given(SCORES, SCORES)
def test_the_estimate_lies_within_its_interval(values, others):
    size = min(len(values), len(others))

    found = compare_paired(METRIC, rows(values[:size]), rows(others[:size]), FEW)

    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9


def test_equal_models_are_promoted_about_as_seldom_as_the_confidence_says():
    generator = np.random.default_rng(0)
    trials, promoted = 300, 0

    for _ in range(trials):
        values, others = generator.integers(0, 2, (2, 100))
        promoted += compare_paired(METRIC, rows(values), rows(others), FEW).is_better

    # One side of a 95 % interval: 2.5 %; three standard deviations of 300 trials reach to 5.2 %.
    assert promoted / trials < 0.052


def test_a_metric_where_less_is_better_is_turned_round():
    metric = build_metric(MetricSpec(name="character_error_rate"))
    good = [{"item": str(i), "stats": {metric.name: [1, 10]}} for i in range(20)]
    bad = [{"item": str(i), "stats": {metric.name: [5, 10]}} for i in range(20)]

    found = compare_paired(metric, good, bad, FEW)

    assert found.score < found.other_score
    assert found.is_better


def test_other_items_are_refused():
    with pytest.raises(InputError, match="different items"):
        compare_paired(METRIC, rows([1, 0]), rows([1, 0], first=1), FEW)


def test_one_item_is_refused():
    with pytest.raises(InputError, match="at least 2"):
        compare_paired(METRIC, rows([1]), rows([0]), FEW)


def test_items_are_the_same_in_any_order_but_not_in_any_number():
    assert same_items(rows([1, 0]), rows([0, 1])[::-1])
    assert not same_items(rows([1, 0]), rows([1, 0, 1]))


def test_a_fall_on_other_items_is_seen_and_chance_is_not():
    before = rows([1] * 80 + [0] * 20)
    fallen, held = rows([1] * 40 + [0] * 60, first=500), rows([1] * 78 + [0] * 22, first=500)

    assert compare_unpaired(METRIC, fallen, before, FEW).is_worse
    assert not compare_unpaired(METRIC, held, before, FEW).is_worse


def test_the_sentence_names_both_and_the_interval():
    found = compare_paired(METRIC, rows([1] * 9 + [0]), rows([0] * 9 + [1]), FEW)

    said = found.sentence("version 2", "version 1")

    assert said.startswith("version 2 has exact_match 0.9, version 1 0.1 on 10 items")
    assert "95 %:" in said
