"""``tell quanta controls``: options that would do nothing together are refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tell_core.analysis.quanta import acceptance


def test_a_parity_problem_for_another_control_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "run_control", lambda _name: [])
    problem = tmp_path / "parity.yaml"
    problem.write_text("{}")

    result = CliRunner().invoke(
        app, ["quanta", "controls", "--only", "gaussian", "--parity", str(problem)]
    )

    assert result.exit_code == 2
    assert "sparse-parity" in result.stderr and "gaussian" in result.stderr
