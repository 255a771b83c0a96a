import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.words import count, metric_words, number, rounded, short


@given(st.floats(1, 1e9))
def test_rounding_keeps_two_digits_and_stays_within_five_percent(value: float) -> None:
    found = rounded(value)

    assert len(str(found).rstrip("0")) <= 2
    assert found == pytest.approx(value, rel=0.051) or value < 10


def test_numbers_read_as_people_write_them() -> None:
    assert (rounded(0.0), count(12345.6), count(None)) == (0, "12,346", "no")
    assert (short(4.14), short(16.4), number(-0.5396)) == ("4.1", "16", "−0.54")
    assert (metric_words("log_probability"), metric_words("exact_match")) == (
        "log-probability",
        "exact match",
    )
