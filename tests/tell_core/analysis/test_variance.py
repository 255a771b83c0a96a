import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.resampling import Resampling
from tell_core.analysis.variance import variance_row
from tests.tell_core.analysis.studies import flat_point, point

FAST = Resampling(num_draws=300)
NUM_ITEMS, NUM_SEEDS = 60, 4


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_the_components_are_those_of_the_simulation(num_repeats: int) -> None:
    item, seed, both, decoding = 0.5, 0.08, 0.3, 0.4
    rows = [_simulated(at, item, seed, both, decoding, num_repeats) for at in range(250)]

    def variance(name: str) -> float:
        return float(np.mean([row[name] ** 2 for row in rows]))

    from_decoding = decoding**2 / NUM_ITEMS
    unknown = 0.0 if num_repeats > 1 else from_decoding
    assert variance("item_sd") == pytest.approx((item**2 + both**2) / NUM_ITEMS + unknown, rel=0.1)
    assert variance("seed_sd") == pytest.approx(seed**2 + both**2 / NUM_ITEMS + unknown, rel=0.2)
    if num_repeats > 1:
        assert variance("decoding_sd") == pytest.approx(from_decoding, rel=0.1)
    else:
        assert {row["decoding_sd"] for row in rows} == {None}


def test_scatter_that_all_seeds_share_is_no_seed_noise() -> None:
    items = np.random.default_rng(0).normal(0, 1, NUM_ITEMS)
    scores = items + 0.01 * np.arange(3)[:, None]

    row = variance_row(point("sft", 100, scores, resampling=FAST), [], is_generated=False)

    assert row["seed_sd"] == pytest.approx(0.01)
    assert row["item_sd"] == pytest.approx(items.std(ddof=1) / NUM_ITEMS**0.5, rel=0.15)


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.0, 0.3, float("nan")]))
@settings(max_examples=30, deadline=None)
def test_constant_zero_and_missing_scores_have_no_variance_but_a_reason(
    num_seeds: int, num_repeats: int, score: float
) -> None:
    row = variance_row(
        flat_point("sft", 100, score, num_seeds), [[score] * num_repeats] * num_seeds,
        is_generated=True,
    )  # fmt: skip

    assert row["item_sd"] is None and row["seed_sd"] is None
    assert row["reason"]
    json.dumps(row, allow_nan=False)


def test_one_seed_shows_no_seed_noise() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 40))

    row = variance_row(point("sft", 100, scores), [[0.1, 0.2]], is_generated=True)

    assert row["seed_sd"] is None and "one seed" in row["reason"]
    assert row["item_sd"] > 0
    assert row["decoding_sd"] == pytest.approx(np.std([0.1, 0.2], ddof=1))


def test_decoding_noise_larger_than_all_scatter_leaves_none_of_it() -> None:
    scores = 0.5 + 0.001 * np.random.default_rng(0).normal(size=(3, 40))

    row = variance_row(point("sft", 100, scores), [[0.1, 0.9]] * 3, is_generated=True)

    assert row["item_sd"] == 0 and row["seed_sd"] == 0


def test_decoded_once_the_floor_is_unknown_and_without_generation_it_is_zero() -> None:
    one = point("sft", 100, np.random.default_rng(0).normal(size=(3, 40)))

    generated = variance_row(one, [(), (), ()], is_generated=True)
    scored = variance_row(one, [(), (), ()], is_generated=False)

    assert generated["decoding_sd"] is None and "num_repeats" in generated["reason"]
    assert scored["decoding_sd"] == 0 and scored["reason"] is None


def _simulated(
    at: int, item: float, seed: float, both: float, decoding: float, num_repeats: int
) -> dict[str, Any]:
    generator = np.random.default_rng(at)
    shared = generator.normal(0, item, NUM_ITEMS)
    trained = generator.normal(0, seed, (NUM_SEEDS, 1)) + generator.normal(
        0, both, (NUM_SEEDS, NUM_ITEMS)
    )
    noise = generator.normal(0, decoding, (num_repeats, NUM_SEEDS, NUM_ITEMS))
    scores = shared + trained + noise
    repeats = scores.mean(axis=2).T.tolist()
    return variance_row(point("sft", 100, scores[0], resampling=FAST), repeats, is_generated=True)
