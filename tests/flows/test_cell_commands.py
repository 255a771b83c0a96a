"""``tell cell``: the way of a cell to another machine and back."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness
from typer.testing import CliRunner, Result

from flows.cli import app
from tell_core.store import read_json
from tests.fixtures.tiny import write_tiny_spec

runner = CliRunner()

SMALL = {
    "arms": ["base", "sft", "tell"],
    "seeds": [0, 1],
    "budgets": {"task_tokens": [200, 400], "general_tokens": 800},
}


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    return " ".join((result.output + result.stderr).split())


@pytest.fixture
def spec(tmp_path: Path, tiny_world: Path) -> Path:
    return write_tiny_spec(tmp_path / "spec.yaml", tiny_world, **SMALL)


def test_a_tuned_experiment_says_that_the_cells_follow(spec: Path, tmp_path: Path):
    result = call("cell", "export", spec, "--out", tmp_path / "run", "--to", tmp_path / "first")

    assert result.exit_code == 0, said(result)
    assert "4 trainings of the tuning to run, 0 finished already" in said(result)
    assert "writes the cells themselves" in said(result)
    assert f"tell cell import {tmp_path / 'first'} --out {tmp_path / 'run'}" in said(result)


def test_a_run_directory_is_exported_by_the_specification_it_holds(spec: Path, tmp_path: Path):
    settings = ["--set", "training.learning_rate=0.003", "--set", "seeds=[0]", "--json"]
    first = call(
        "cell", "export", spec, "--out", tmp_path / "run", "--to", tmp_path / "a", *settings
    )

    again = call("cell", "export", tmp_path / "run", "--to", tmp_path / "b", "--tar", "--json")

    names = [[Path(path).stem for path in json.loads(r.stdout)["bundles"]] for r in (first, again)]
    assert names[0] == names[1]
    assert len(names[0]) == 5
    assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".tar"}


def test_what_holds_no_bundle_is_refused(tmp_path: Path):
    (tmp_path / "stages").mkdir()

    ran = call("cell", "run", tmp_path)
    imported = call("cell", "import", tmp_path, "--out", tmp_path)
    nowhere = call("cell", "import", tmp_path, "--out", tmp_path / "none")

    assert ran.exit_code == imported.exit_code == nowhere.exit_code == 2
    assert "tell cell export" in said(imported)
    assert "is no run directory" in said(nowhere)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_tuning_and_cells_were_run_as_bundles_a_run_only_analyses(spec: Path, tmp_path: Path):
    root = tmp_path / "run"
    for part in ("tuning", "cells"):
        bundles = tmp_path / part
        assert call("cell", "export", spec, "--out", root, "--to", bundles).exit_code == 0
        assert call("cell", "run", bundles, "--device", "cpu").exit_code == 0
        imported = call("cell", "import", bundles, "--out", root, "--json")
        assert {row["outcome"] for row in json.loads(imported.stdout)} == {"imported"}
    begin = datetime.now(UTC)

    with prefect_test_harness(server_startup_timeout=180):
        from flows.experiment import run_experiment
        from tests.flows.test_experiment import task_runs_since

        run_experiment(spec, [], root, False)
        states = {
            stage: set(task_runs_since(begin, f"{stage} · ").values())
            for stage in ("train", "evaluate")
        }

    assert states == {"train": {"Reused"}, "evaluate": {"Reused"}}
    assert read_json(root / "leverage.json")["metrics"]["log_probability"]["arms"]["tell"]
