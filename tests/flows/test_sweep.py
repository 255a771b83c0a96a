"""The weekly sweep without a server: an experiment that fails is noted, the others run."""

import logging
from pathlib import Path
from typing import Any

import pytest

from flows import sweep
from tell_core.errors import TellError


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), OSError("disk"), TellError("spec")])
def test_an_experiment_that_fails_in_any_way_does_not_stop_the_others(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
):
    tables: list[list[dict[str, str]]] = []

    def run_one(spec_file: Path, *_: Any) -> str:
        if spec_file.stem == "broken":
            raise failure
        return "run"

    monkeypatch.setattr(sweep, "_run_one", run_one)
    monkeypatch.setattr(sweep, "end_with_worker", lambda: None, raising=False)
    monkeypatch.setattr(sweep, "get_run_logger", lambda: logging.getLogger("sweep"), raising=False)
    monkeypatch.setattr(sweep, "create_table_artifact", lambda table, **_: tables.append(table))

    with pytest.raises(TellError, match="1 of 2 experiments failed: broken"):
        sweep.run_sweep.fn([Path("broken.yaml"), Path("sound.yaml")])

    outcomes = {row["experiment"]: row["outcome"] for row in tables[0]}
    assert outcomes["broken"] == f"failed: {type(failure).__name__}: {failure}"
    assert outcomes["sound"] == "run"
