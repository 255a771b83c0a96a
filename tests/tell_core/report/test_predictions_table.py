import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tell_core.report.blocks import Table, Text, charts_of
from tell_core.report.predictions_table import mechanism
from tell_core.report.reading import read_run

BuildRun = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("without_drawing")

PART = {"name": "gain <b>", "estimate": 0.3, "low": 0.1, "high": None, "p_value": 0.01,
        "is_as_predicted": True}  # fmt: skip
FIGURES: dict[str, Any] = {
    "P1": {
        "general_tokens": [200, 200, 900],
        "items": [
            {"item": "a", "verdict": "step", "guard_share": 0.9, "losses": [2.0, 1.0, 0.1]},
            {"item": "b", "verdict": "flat", "guard_share": None, "losses": [1.0, 1.0, 1.0]},
        ],
    },
    "P2": {
        "survival": {
            name: {"step": [3.0, 9.0], "unlearned": [0.5, 0.2], "standard_error": [0.1, 0.1]}
            for name in ("shared", "specific")
        }
    },
    "P3": {"points": [{"skill": "x", "frequency": 0.2, "step": 4.0, "is_learned": True}]},
    "P7": {
        "directions": [
            {
                "arm": arm,
                "from_step": 1.0,
                "to_step": step,
                "shared": 0.1,
                "specific": 0.3,
                "difference": 0.2,
                "low": 0.1,
                "high": 0.3,
                "p_value": 0.01,
            }
            for arm in ("tell", "sft")
            for step in (2.0, 9.0)
        ]
    },
}


def row(name: str, verdict: str, **changes: Any) -> dict[str, Any]:
    return {
        "prediction": name, "claim": f"claim of {name}", "measure": "gain <b>", "estimate": 0.3,
        "low": 0.1, "high": None, "p_value": 0.01, "p_holm": 0.04, "verdict": verdict,
        "reason": None, "remark": f"remark on {name}", "components": [PART],
        "figure": FIGURES.get(name, {}),
    } | changes  # fmt: skip


@pytest.fixture
def tested(build_run: BuildRun) -> Path:
    path = build_run()
    (path / "quanta").mkdir()
    open_row = row("P4", "undetermined", components=[], estimate=None, low=None, p_holm=None,
                   reason="arms tell_no_anchor")  # fmt: skip
    rows = [row(name, "supported") for name in ("P1", "P2", "P3")] + [open_row]
    content = {"task_budget_tokens": 480, "general_budget_tokens": 9400, "predictions": rows}
    (path / "quanta" / "predictions.json").write_text(json.dumps(content))
    return path


def test_every_prediction_has_its_verdict_and_what_it_needs(tested: Path) -> None:
    section = mechanism(read_run(tested))

    table = next(block for block in section.blocks if isinstance(block, Table))
    assert [(line[0].text, line[2].text) for line in table.rows] == [
        ("P1", "supported"), ("P2", "supported"), ("P3", "supported"), ("P4", "undetermined"),
    ]  # fmt: skip
    assert table.rows[0][4].text.endswith("∞]")
    assert table.rows[3][6].text == "needs arms tell_no_anchor"


def test_the_figures_behind_the_verdicts_carry_their_numbers(tested: Path) -> None:
    charts = list(charts_of(mechanism(read_run(tested)).blocks))

    assert [chart.name for chart in charts] == ["prediction-1", "prediction-2", "prediction-3"]
    assert ("a", "step", 200, 1.5) in charts[0].data.rows
    assert "1 item with a step, 1 other shown" in charts[0].alt
    assert ("shared", 9.0, 0.2) in charts[1].data.rows


def test_the_way_the_weights_move_has_a_chart_per_arm(tested: Path) -> None:
    path = tested / "quanta" / "predictions.json"
    content = json.loads(path.read_text())
    content["predictions"] = [row("P7", "supported")]
    path.write_text(json.dumps(content))

    charts = list(charts_of(mechanism(read_run(tested)).blocks))

    assert [chart.name for chart in charts] == ["prediction-7-tell", "prediction-7-sft"]
    assert "0.1" in charts[0].alt
    assert [point[1] for point in charts[0].data.rows] == [2.0, 9.0]


def test_a_run_that_was_not_tested_says_how_to_test_it(build_run: BuildRun) -> None:
    (sentence,) = mechanism(read_run(build_run())).blocks

    assert isinstance(sentence, Text)
    assert "tell quanta predictions" in sentence.text
