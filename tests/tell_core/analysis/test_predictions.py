"""The table of predictions: one that these data cannot answer leaves the others standing."""

from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis import predictions
from tell_core.analysis.predictions import measure_predictions
from tell_core.errors import AnalysisError
from tell_core.store import read_json, write_json
from tests.tell_core.analysis.small_runs import (
    World,
    by_use,
    quantum_world,
    run_spec,
    stepping_tests,
    write_run,
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with three general budgets, on which P7 fails as a measure may."""
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [200, 1050, 9400]})
    _, cells = write_run(tmp_path, spec, World(stepping_tests, quantum_world, by_use))
    write_json(tmp_path / "manifest.json", {"stages": {"curate": "curate-none"}})
    leverage = {"primary_metric": "log_probability", "metrics": {}}
    write_json(tmp_path / "leverage.json", leverage)
    monkeypatch.setattr(predictions, "finished_run", lambda _root: (spec, cells))
    return tmp_path


def fails(*_given: object) -> None:
    raise AnalysisError("2 units were learned; a regression needs at least 4")


@pytest.mark.parametrize(
    ("measure", "prediction"),
    [
        ("emergence_with_data", "P1"),
        ("shared_before_specific", "P2"),
        ("time_by_frequency", "P3"),
        ("anchor_mediates", "P4"),
        ("shuffle_beats_order", "P5"),
        ("leverage_above_one", "P6"),
        ("specific_directions", "P7"),
    ],
)
def test_a_measure_that_the_data_do_not_allow_is_undetermined_with_its_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch, measure: str, prediction: str
) -> None:
    monkeypatch.setattr(predictions, measure, fails)

    rows = measure_predictions(root)["predictions"]

    by_name = {row["prediction"]: row for row in rows}
    assert list(by_name) == [f"P{number}" for number in range(1, 8)]
    assert by_name[prediction]["verdict"] == "undetermined"
    assert by_name[prediction]["reason"].startswith("2 units were learned")


def test_units_that_were_known_have_no_place_in_the_sequence(root: Path) -> None:
    with np.load(path := next(root.glob("tell-*9400-s0")) / "probe.npz") as arrays:
        steps, losses = arrays["steps"], arrays["losses"]
    known = np.where(np.arange(losses.shape[1]) == 0, 0.01, losses)
    np.savez(path, steps=steps, losses=known)

    measure_predictions(root)

    arm = read_json(root / "quanta" / "sequence.json")["arms"]["tell"]
    steps = [row["step"] for row in arm["order"]]
    assert (arm["order"][0]["rank"], steps[0]) == (None, None)
    assert None not in steps[1:]
