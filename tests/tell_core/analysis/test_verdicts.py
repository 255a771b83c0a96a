import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.verdicts import Component, Finding, judge


def part(p_value: float, *, as_predicted: bool = True, name: str = "part") -> Component:
    return Component(name, 1.0 if as_predicted else -1.0, None, None, p_value, as_predicted)


def finding(*parts: Component, needs: str | None = None) -> Finding:
    return Finding("P1", "a claim", parts, needs=needs)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_a_prediction_of_several_parts_is_no_surer_than_its_weakest(p_values: list[float]) -> None:
    assert finding(*map(part, p_values)).p_value == max(p_values)


def test_parts_that_point_the_other_way_are_allowed_for_by_their_number() -> None:
    found = finding(part(0.2), part(0.01, as_predicted=False), part(0.3, as_predicted=False))

    assert found.p_value == 0.02


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (finding(part(0.001)), "supported"),
        (finding(part(0.001, as_predicted=False)), "contradicted"),
        (finding(part(0.001), part(0.002, as_predicted=False)), "contradicted"),
        (finding(part(0.001), part(0.4)), "undetermined"),
        (finding(part(0.001), needs="more seeds"), "undetermined"),
        (finding(needs="an arm"), "undetermined"),
    ],
)
def test_the_verdict_follows_from_the_parts(found: Finding, verdict: str) -> None:
    (row,) = judge([found], 0.95)

    assert row["verdict"] == verdict


def test_an_undetermined_prediction_says_what_is_missing() -> None:
    open_part, needy = judge([finding(part(0.4, name="gain")), finding(needs="8 budgets")], 0.95)

    assert open_part["reason"] == "the null is not excluded: gain"
    assert needy["reason"] == "8 budgets"


def test_predictions_that_could_not_be_tested_do_not_count_in_the_correction() -> None:
    rows = judge([finding(part(0.02)), finding(part(0.03)), finding(needs="an arm")], 0.95)

    assert [row["p_holm"] for row in rows] == [0.04, 0.04, None]


def test_a_verdict_lost_to_the_correction_says_so() -> None:
    rows = judge([finding(part(0.04)), finding(part(0.04))], 0.95)

    assert rows[0]["verdict"] == "undetermined"
    assert "allowing for the other predictions" in rows[0]["reason"]
