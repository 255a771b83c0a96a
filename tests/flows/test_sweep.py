"""The weekly sweep without a server: an experiment that fails is noted, the others run."""

import logging
from pathlib import Path
from typing import Any

import pytest

from flows import sweep
from tell_core.errors import InputError, StoreError, TellError

Tables = list[list[dict[str, str]]]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    """The tables that a sweep without a server leaves; no test waits ten minutes."""
    shown: Tables = []
    monkeypatch.setattr(sweep, "_TRIED_AGAIN_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "end_with_worker", lambda: None)
    monkeypatch.setattr(sweep, "get_run_logger", lambda: logging.getLogger("sweep"))
    monkeypatch.setattr(sweep, "create_table_artifact", lambda table, **_: shown.append(table))
    return shown


@pytest.mark.parametrize("failure", [RuntimeError("no memory"), OSError("disk"), TellError("spec")])
def test_an_experiment_that_fails_in_any_way_does_not_stop_the_others(
    failure: Exception, tables: Tables, monkeypatch: pytest.MonkeyPatch
):
    def run_one(spec_file: Path, *_: Any) -> str:
        if spec_file.stem == "broken":
            raise failure
        return "run"

    monkeypatch.setattr(sweep, "_run_one", run_one)

    with pytest.raises(TellError, match="1 of 2 experiments failed: broken"):
        sweep.run_sweep.fn([Path("broken.yaml"), Path("sound.yaml")])

    outcomes = {row["experiment"]: row["outcome"] for row in tables[0]}
    assert outcomes["broken"] == f"failed: {type(failure).__name__}: {failure}"
    assert outcomes["sound"] == "run"


@pytest.mark.parametrize(
    ("failure", "num_tries"), [(StoreError("away"), 2), (OSError("disk"), 2), (InputError("no"), 1)]
)
def test_what_may_pass_is_tried_once_more_after_all_others_and_wrong_input_is_not(
    failure: Exception, num_tries: int, tables: Tables, monkeypatch: pytest.MonkeyPatch
):
    tried: list[str] = []

    def run_one(spec_file: Path, *_: Any) -> str:
        tried.append(spec_file.stem)
        if spec_file.stem == "shaky" and tried.count("shaky") == 1:
            raise failure
        return "run"

    monkeypatch.setattr(sweep, "_run_one", run_one)

    if num_tries == 1:
        with pytest.raises(TellError, match="1 of 2"):
            sweep.run_sweep.fn([Path("shaky.yaml"), Path("sound.yaml")])
    else:
        sweep.run_sweep.fn([Path("shaky.yaml"), Path("sound.yaml")])

    assert tried == ["shaky", "sound", "shaky"][: num_tries + 1]
