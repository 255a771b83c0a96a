"""The section on scaling: claims, refusals and the finite-K slope as scaling.json has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tell_core.report.blocks import Section, Table, Text, charts_of
from tell_core.report.reading import read_run
from tell_core.report.scaling import scaling

BuildRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("without_drawing")


def curve(kind: str, arm: str, role: str, **changes: Any) -> dict[str, Any]:
    points = [
        {"x": x, "mean": 2 / x, "low": 1 / x, "high": 3 / x, "seeds": []} for x in (1.0, 10.0, 90.0)
    ]
    return {
        "kind": kind, "arm": arm, "role": role, "status": "power law", "reason": None,
        "best": "power law", "delta_aicc": {"power law": 0.0, "flat": 30.0, "exponential": 6.5},
        "exponent": 0.5, "low": 0.4, "high": 0.625, "offset": 0.1, "amplitude": 2.0,
        "num_points": 16, "num_seeds": 3, "points": points,
    } | changes  # fmt: skip


REFUSED = {
    "status": "undetermined", "reason": "it has 2 points; at least 8 are needed", "best": None,
    "delta_aicc": {}, "exponent": None, "low": None, "high": None, "offset": None,
    "amplitude": None,
}  # fmt: skip
MEAN = {"mean": -0.5, "low": -0.6, "high": -0.4}
PREDICTED = {
    "arm": "tell", "num_known": 0, "num_quanta": 24, "num_seeds": 3, "reason": None,
    "beta": MEAN, "slope": MEAN,
    "predicted_slope": MEAN, "difference": MEAN | {"mean": 0.02}, "zipf_alpha": None,
    "asymptotic_slope": None, "asymptotic_reason": "4 skills", "left": 0.12,
    "predicted_left": 0.04, "points": [{"x": 5.0, "measured": 2.0, "predicted": 1.9}],
}  # fmt: skip


@pytest.fixture
def show(build_run: BuildRun) -> Callable[..., Section]:
    def with_scaling(curves: list[dict[str, Any]], finite_k: dict[str, Any]) -> Section:
        path = build_run()
        (path / "quanta").mkdir()
        content = {"min_points": 8, "task_budget_tokens": 960, "general_budget_tokens": 9400,
                   "curves": curves, "finite_k": finite_k}  # fmt: skip
        (path / "quanta" / "scaling.json").write_text(json.dumps(content))
        return scaling(read_run(path))

    return with_scaling


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def test_every_curve_has_its_exponent_or_the_reason_why_it_has_none(show) -> None:
    rows = [
        curve("steps", "tell", "task"),
        curve("task_tokens", "sft", "task", **REFUSED),
    ]

    section = show(rows, {"reason": "unknown use", "arms": []})

    (table,) = tables(section)
    first, second = ([entry.text for entry in row] for row in table.rows)
    assert first[5:] == ["0.500", "[0.400, 0.625]", "0.100", "power law", "leads by 6.500 in AICc"]
    assert second[5:] == ["–", "–", "–", "undetermined", REFUSED["reason"]]
    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "Of 2 curves of the mean loss, 1 fall as a power law" in said
    assert "unknown use" in said


def test_there_is_a_figure_per_kind_and_role_with_the_numbers_of_all_arms(show) -> None:
    arms = ["tell", "sft", "sft_matched", "general_only", "tell_no_anchor"]
    rows = [curve("steps", arm, "task") for arm in arms]
    rows += [curve("general_tokens", "tell", "general")]

    charts = list(charts_of(show(rows, {"reason": None, "arms": [PREDICTED]}).blocks))

    names = ["scaling-steps-task", "scaling-finite-k", "scaling-general_tokens-general"]
    assert [chart.name for chart in charts] == names
    assert {row[0] for row in charts[0].data.rows} == set(arms)
    assert len(charts[0].legend) == 4
    assert charts[1].data.rows == ((5.0, 2.0, 1.9),)


def test_the_predicted_slope_stands_beside_the_measured_one(show) -> None:
    other = {"arm": "general_only", "reason": "too few skills", "num_quanta": 4, "num_seeds": 3}

    section = show([], {"reason": None, "arms": [PREDICTED, other]})

    (table,) = tables(section)
    texts = [entry.text for entry in table.rows[0]]
    assert texts[3:8] == ["−0.500", "−0.500", "+0.020", "[−0.600, −0.400]", "–"]
    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "4 skills" in said
    assert "too few skills" in said
    assert "0.07 to 0.25" in said
    assert "known before training" not in said


def test_skills_left_out_of_the_prediction_are_counted(show) -> None:
    section = show([], {"reason": None, "arms": [PREDICTED | {"num_known": 12}]})

    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert "12 skills known before training left out" in said


def test_a_run_that_was_not_measured_says_how_to_measure_it(build_run: BuildRun) -> None:
    (sentence,) = scaling(read_run(build_run())).blocks

    assert isinstance(sentence, Text)
    assert "tell quanta predictions" in sentence.text
