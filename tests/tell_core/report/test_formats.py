"""Numbers as written in the report."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.report.formats import (
    MISSING,
    as_number,
    format_count,
    format_leverage,
    format_ratio,
    format_score,
    format_seconds,
    format_short_tokens,
    format_time,
    leverage_bound,
)

POSITIVE = st.floats(min_value=1e-3, max_value=1e6)


@given(POSITIVE)
def test_a_written_ratio_is_within_a_twentieth_of_the_number(ratio: float) -> None:
    written = float(format_ratio(ratio).replace(",", ""))

    assert math.isclose(written, ratio, rel_tol=0.0501)


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_a_written_count_reads_back(count: int) -> None:
    assert int(format_count(count).replace(",", "").replace("−", "-")) == count


@given(st.floats(min_value=1, max_value=1e9))
def test_short_tokens_keep_three_digits(tokens: float) -> None:
    written = format_short_tokens(tokens)
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(written[-1], 1)

    assert math.isclose(float(written.rstrip("kMG")) * unit, tokens, rel_tol=0.0051)


@given(st.sampled_from([None, math.nan, math.inf, -math.inf, True, "3", [1]]))
def test_what_is_no_finite_number_is_missing(value: object) -> None:
    assert as_number(value) is None
    assert format_score(value) == format_ratio(value) == format_count(value) == MISSING


@given(POSITIVE, POSITIVE)
def test_a_bound_is_never_written_as_a_ratio(bound: float, end: float) -> None:
    above = {"censored": "above", "bound": bound, "ratio": None, "low": end, "high": None}
    below = {"censored": "below", "bound": bound, "ratio": None, "low": None, "high": end}

    assert format_leverage(above) == f"≥ {format_ratio(bound)}×"
    assert format_leverage(below) == f"≤ {format_ratio(bound)}×"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(2.9, 6.0, "4.1× [2.9, 6.0]"), (2.9, None, "4.1× [2.9, ∞)"), (None, 6.0, "4.1× (0, 6.0]")],
)
def test_a_missing_end_of_the_interval_is_unbounded(
    low: float | None, high: float | None, expected: str
) -> None:
    assert (
        format_leverage({"censored": "none", "ratio": 4.123, "low": low, "high": high}) == expected
    )


def test_a_point_estimate_without_interval_is_undefined() -> None:
    row = {"censored": "undefined", "ratio": 3.7, "low": None, "high": None, "bound": None}

    assert format_leverage(row) == "undefined"
    assert leverage_bound(row) is None


def test_times_are_written_to_the_minute_and_other_text_stays() -> None:
    assert format_time("2026-03-02T10:11:12+00:00") == "2026-03-02 10:11 UTC"
    assert format_time("yesterday") == "yesterday"


def test_durations_take_the_largest_fitting_unit() -> None:
    assert [format_seconds(s) for s in (5, 75, 9000)] == ["5.0 s", "1.2 min", "2.5 h"]
