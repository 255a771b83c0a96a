"""What `tell quanta predictions` prints; nothing is measured here."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from tell_core.analysis import predictions
from tell_core.report import page
from tell_core.store import write_json

ROW = {
    "prediction": "P1", "verdict": "undetermined", "estimate": None, "low": None, "high": None,
    "p_holm": None, "reason": "at least 3 seeds", "measure": None,
}  # fmt: skip
CURVE = {
    "kind": "general_tokens", "arm": "tell", "role": "task", "num_points": 8, "exponent": 0.51,
    "low": 0.4, "high": 0.65, "status": "power law", "reason": None,
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose measurements are given."""

    def measured(root: Path, _progress: object) -> dict:
        (root / "quanta").mkdir(exist_ok=True)
        write_json(root / "quanta" / "scaling.json", {"curves": [CURVE]})
        return {"predictions": [ROW]}

    monkeypatch.setattr(predictions, "measure_predictions", measured)
    monkeypatch.setattr(page, "write_report", lambda root: root / "report.html")
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quanta", "predictions", *map(str, arguments)])


def test_predictions_and_scaling_stand_in_a_table_each(root: Path) -> None:
    result = call(root)

    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["P1", "undetermined"] in [line[:2] for line in lines]
    assert "general tokens" in result.stdout
    assert "0.51" in result.stdout


def test_a_program_reads_both(root: Path) -> None:
    found = json.loads(call(root, "--json").stdout)

    assert found["predictions"] == [ROW]
    assert found["scaling"]["curves"] == [CURVE]
