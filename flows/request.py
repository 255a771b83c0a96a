"""The experiment on demand: what a person changes in the form, checked by the form's types."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.forms import ArmName, RunnerName, Setting
from flows.last_words import end_with_worker
from flows.runners import LOCAL
from flows.scheduling import DAY, nothing_to_do, tell_failure, work_state
from tell_core.spec.loading import load_spec
from tell_core.spec.model import Budgets, PositiveFloat, PositiveInt, Seed


@flow(
    name="requested experiment",
    flow_run_name="request · {spec_file.stem}",
    timeout_seconds=7 * DAY,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def request_experiment(
    spec_file: Path,
    settings: list[Setting] | None = None,
    task_tokens: Budgets | None = None,
    general_tokens: Budgets | None = None,
    arms: list[ArmName] | None = None,
    seeds: list[Seed] | None = None,
    learning_rate: list[PositiveFloat] | None = None,
    epochs: list[PositiveInt] | None = None,
    out: Path | None = None,
    track: bool = True,
    adaptive: bool = False,
    runner: RunnerName = LOCAL,
) -> dict[str, Any] | State[None]:
    """Run an experiment with some of its fields changed; nothing is done twice.

    Args:
        spec_file: The experiment's YAML, relative to the project's directory.
        settings: ``name=value`` for its variables and any other field.
        task_tokens: Upper bounds on task tokens; empty: as in the YAML, here and below.
        general_tokens: Upper bounds on general tokens.
        arms: Arms to compare.
        seeds: Training seeds.
        learning_rate: Peak learning rates; several are tuned.
        epochs: Passes over the mixture; several are tuned.
        out: Run directory; ``runs/<experiment name>`` by default.
        track: Whether to record the run in MLflow.
        adaptive: Run only the cells that the answer needs.
        runner: Where the cells are computed: local, dask or ray.
    """
    end_with_worker()
    from flows.experiment import run_experiment
    from tell_core.results import default_root

    fields = {
        "budgets.task_tokens": task_tokens,
        "budgets.general_tokens": general_tokens,
        "arms": arms,
        "seeds": seeds,
        "training.learning_rate": learning_rate,
        "training.epochs": epochs,
    }
    changed = [f"{name}={list(value)}" for name, value in fields.items() if value]
    changed = [*(settings or []), *changed]
    spec = load_spec(spec_file, changed)
    root = out or default_root(spec)
    state = work_state(spec, root, track=track, is_adaptive=adaptive)
    if state != "to do":
        return nothing_to_do(f"{spec.name} is {state} in {root}")
    return run_experiment(spec_file, changed, root, track, adaptive, runner)
