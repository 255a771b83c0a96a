"""The weekly sweep: every experiment of a list whose data, model or settings have changed."""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.experiment import run_experiment
from flows.last_words import end_with_worker
from flows.scheduling import nothing_to_do, tell_failure, work_state
from tell_core.errors import TellError
from tell_core.results import default_root
from tell_core.spec.loading import load_spec


@flow(
    name="weekly sweep",
    flow_run_name="sweep",
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def run_sweep(
    spec_files: list[Path],
    settings: list[str] | None = None,
    track: bool = True,
    adaptive: bool = False,
) -> dict[str, str] | State[None]:
    """Run the experiments that are neither finished nor under way, one after another.

    One that fails, however it fails, does not stop the others; the sweep then fails at its end.

    Args:
        spec_files: The experiments' YAML files.
        settings: ``name=value`` for their variables and fields, the same for all.
        track: Whether to record the runs in MLflow.
        adaptive: Run only the cells that the answers need.
    """
    end_with_worker()
    found: dict[str, str] = {}
    for spec_file in spec_files:
        try:
            found[spec_file.stem] = _run_one(spec_file, settings or [], track, adaptive)
        except Exception as error:  # a server's outage or a full disk is one experiment's too
            get_run_logger().exception("%s failed", spec_file.stem)
            found[spec_file.stem] = f"failed: {type(error).__name__}: {error}"
    rows = [{"experiment": name, "outcome": outcome} for name, outcome in found.items()]
    create_table_artifact(key="sweep", table=rows, description="Experiments of the sweep")
    failed = [name for name, outcome in found.items() if outcome.startswith("failed")]
    if failed:
        raise TellError(f"{len(failed)} of {len(found)} experiments failed: {', '.join(failed)}")
    if "run" not in found.values():
        return nothing_to_do("; ".join(f"{name} is {what}" for name, what in found.items()))
    return found


def _run_one(spec_file: Path, settings: list[str], track: bool, is_adaptive: bool) -> str:
    spec = load_spec(spec_file, settings)
    root = default_root(spec)
    state = work_state(spec, root, track=track, is_adaptive=is_adaptive)
    if state != "to do":
        return state
    run_experiment(spec_file, settings, root, track, is_adaptive)
    return "run"
