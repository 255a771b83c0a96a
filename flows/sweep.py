"""The weekly sweep: every experiment of a list whose data, model or settings have changed."""

import time
from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.forms import Setting
from flows.last_words import end_with_worker
from flows.scheduling import DAY, nothing_to_do, tell_failure, work_state
from tell_core.errors import InputError, TellError
from tell_core.spec.loading import load_spec

# A server or a disk may be back by then; the next sweep is a week away.
_TRIED_AGAIN_AFTER_SECONDS = 600.0


@flow(
    name="weekly sweep",
    flow_run_name="sweep",
    timeout_seconds=6 * DAY,  # one that hangs must not keep the next week's from its start
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def run_sweep(
    spec_files: Annotated[list[Path], Field(min_length=1)],
    settings: list[Setting] | None = None,
    track: bool = True,
    adaptive: bool = False,
) -> dict[str, str] | State[None]:
    """Run the experiments that are neither finished nor under way, one after another.

    One that fails, however it fails, does not stop the others; unless its input was wrong it is
    tried once more after ten minutes. What then still fails, fails the sweep at its end.

    Args:
        spec_files: The experiments' YAML files.
        settings: ``name=value`` for their variables and fields, the same for all.
        track: Whether to record the runs in MLflow.
        adaptive: Run only the cells that the answers need.
    """
    end_with_worker()
    found: dict[str, str] = {}
    again = []
    for spec_file in spec_files:
        found[spec_file.stem], may_pass = _outcome(spec_file, settings or [], track, adaptive)
        again += [spec_file] if may_pass else []
    if again:
        time.sleep(_TRIED_AGAIN_AFTER_SECONDS)
    for spec_file in again:
        found[spec_file.stem], _ = _outcome(spec_file, settings or [], track, adaptive)
    rows = [{"experiment": name, "outcome": outcome} for name, outcome in found.items()]
    create_table_artifact(key="sweep", table=rows, description="Experiments of the sweep")
    failed = [name for name, outcome in found.items() if outcome.startswith("failed")]
    if failed:
        raise TellError(f"{len(failed)} of {len(found)} experiments failed: {', '.join(failed)}")
    if "run" not in found.values():
        return nothing_to_do("; ".join(f"{name} is {what}" for name, what in found.items()))
    return found


def _outcome(
    spec_file: Path, settings: list[str], track: bool, is_adaptive: bool
) -> tuple[str, bool]:
    """What came of an experiment, and whether it failed for a reason that may pass."""
    try:
        return _run_one(spec_file, settings, track, is_adaptive), False
    except Exception as error:  # a server's outage or a full disk is one experiment's too
        get_run_logger().exception("%s failed", spec_file.stem)
        return f"failed: {type(error).__name__}: {error}", not isinstance(error, InputError)


def _run_one(spec_file: Path, settings: list[str], track: bool, is_adaptive: bool) -> str:
    from flows.experiment import run_experiment
    from tell_core.results import default_root

    spec = load_spec(spec_file, settings)
    root = default_root(spec)
    state = work_state(spec, root, track=track, is_adaptive=is_adaptive)
    if state != "to do":
        return state
    run_experiment(spec_file, settings, root, track, is_adaptive)
    return "run"
