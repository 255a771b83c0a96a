"""A power law of use is believed only when everything speaks for it."""

import numpy as np
import pytest

from tell_core.analysis.quanta import ranks
from tell_core.analysis.quanta.ranks import EVIDENCE, NO_EVIDENCE, rank_verdict


@pytest.fixture(scope="module")
def structureless():
    generator = np.random.default_rng(0)
    return generator.standard_normal((300, 40)), generator.integers(0, 30, 300)


@pytest.fixture(scope="module")
def verdict(structureless):
    return rank_verdict(*structureless)


def test_random_vectors_are_no_evidence(verdict):
    assert verdict.verdict == NO_EVIDENCE
    assert "without clusters" in verdict.reason


def test_there_are_twenty_replicates_of_either_kind(verdict):
    assert len(verdict.null_slopes) == 40


def test_random_vectors_have_a_steep_slope_all_the_same(verdict):
    assert verdict.slope < -0.7


def test_the_interval_holds_the_slope(verdict):
    assert verdict.low < verdict.slope < verdict.high


def test_few_clusters_are_too_few_for_a_law(structureless):
    vectors, _ = structureless

    found = rank_verdict(vectors, np.arange(300) % 3, num_replicates=2)

    assert found.likelihood_ratio is None
    assert found.verdict == NO_EVIDENCE


@pytest.mark.parametrize(
    ("inside", "ratio", "p_value", "expected"),
    [
        (False, 3.0, 0.01, EVIDENCE),
        (True, 3.0, 0.01, NO_EVIDENCE),
        (False, -3.0, 0.01, NO_EVIDENCE),
        (False, 3.0, 0.2, NO_EVIDENCE),
    ],
)
def test_slope_and_law_must_both_speak_for_it(
    inside: bool, ratio: float, p_value: float, expected: str, structureless, monkeypatch
):
    half = 9.0 if inside else 1e-9
    monkeypatch.setattr(ranks, "_half_width", lambda *_: half)
    monkeypatch.setattr(ranks, "_against_lognormal", lambda *_: (ratio, p_value, ""))

    assert rank_verdict(*structureless, num_replicates=2).verdict == expected


def test_sizes_drawn_from_a_power_law_are_not_called_lognormal():
    sizes = np.random.default_rng(0).zipf(1.8, 400)

    ratio, p_value, why_not = ranks._against_lognormal(sizes)

    assert not why_not
    assert ratio > 0 or p_value > 0.05


def test_sizes_drawn_from_a_lognormal_are_called_so():
    sizes = np.random.default_rng(0).lognormal(2.5, 0.6, 400).round().astype(np.int64)

    ratio, p_value, why_not = ranks._against_lognormal(sizes[sizes > 0])

    assert not why_not
    assert ratio < 0
    assert p_value < 0.05
