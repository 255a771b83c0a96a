"""The flow of the cells without a server: however it ends, the lanes end first."""

import asyncio
from pathlib import Path

import pytest
from prefect.exceptions import TerminationSignal

from flows import cells
from tell_core.pipeline import Stage
from tell_core.spec.loading import load_spec
from tests.fixtures.tiny import write_tiny_spec


@pytest.mark.parametrize(
    "end",
    [
        KeyboardInterrupt(),
        TerminationSignal(signal=15),
        asyncio.CancelledError(),  # what Prefect raises when a flow's time is over
    ],
)
def test_lanes_are_stopped_before_the_task_runner_waits_for_its_threads(
    end: BaseException, tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
):
    def announce_total(_: int) -> None:
        raise end

    stopped: list[bool] = []
    monkeypatch.setattr(cells, "announce_total", announce_total)
    monkeypatch.setattr(cells, "stop_lanes", lambda: stopped.append(True))
    spec = load_spec(write_tiny_spec(tmp_path / "tiny.yaml", tiny_world))
    curated = Stage("curate", "f" * 16, tmp_path, reused=False)

    with pytest.raises(type(end)):
        cells.cells_flow.fn(spec, curated, False)

    assert stopped
