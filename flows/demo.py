"""The demo flow: the embedded world, then the same experiment flow as for anyone's data."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.demo_files import demo_settings, demo_spec
from flows.last_words import end_with_worker
from flows.scheduling import HOUR, tell_failure


@flow(
    name="demo",
    timeout_seconds=6 * HOUR,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def run_demo(out: Path, track: bool = True) -> dict[str, Any]:
    """Make the small world and its base model, then run the experiment on it.

    Args:
        out: Run directory.
        track: Whether to record the run in MLflow.
    """
    end_with_worker()
    from flows.experiment import run_experiment
    from tasks.stages import build_world, value_of
    from tell_core.lanes import open_lanes
    from tell_core.results import sole_owner

    out.mkdir(parents=True, exist_ok=True)
    with sole_owner(out), open_lanes(1):
        world = value_of(build_world(out))
    return run_experiment(demo_spec(), demo_settings(world.path), out, track)
