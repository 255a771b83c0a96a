"""One Prefect task per stage. The work is in `tell_core.pipeline`; a stage found finished is
shown as "Reused".

Prefect's own cache is off: a cache hit does not prove that the files still exist, and the stage
directories are checked file by file (docs/adr/0001-stage-directories-are-the-cache.md).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.cell_news import tell_begun
from tasks.progress import DONE, ENDED, Watch, announce
from tell_core import pipeline
from tell_core.analysis.adaptive import Round, round_after
from tell_core.analysis.summary import analyse_run
from tell_core.demo import world_stage
from tell_core.lanes import ProgressFile, in_lane
from tell_core.pipeline import CellOutcome, Stage
from tell_core.report.page import write_report
from tell_core.results import write_results
from tell_core.spec.arms import parse_arm
from tell_core.spec.cells import Cell
from tell_core.spec.model import Candidate, ExperimentSpec
from tell_core.store import read_json

T = TypeVar("T")


@task(name="curate", task_run_name="curate", cache_policy=NO_CACHE)
def curate(spec: ExperimentSpec, root: Path) -> Stage | State[Stage]:
    """Read, clean and count every source; take gradients when an arm selects by them."""

    def on_progress(phase: str, done: int, total: int) -> None:
        announce("curate", phase, done, total)

    stage = pipeline.curate_stage(spec, root, on_progress)
    if any(parse_arm(name).selection == "alignment" for name in spec.arms):
        pipeline.gradients_stage(spec, stage, on_progress)
    announce("curate", ENDED, 1, 1)
    for source in read_json(stage.path / "profile.json")["sources"]:
        get_run_logger().info(
            "%s %s: kept %d of %d examples, %d tokens",
            source["role"], source["name"], source["num_kept"], source["num_read"],
            source["num_tokens"],
        )  # fmt: skip
    return _shown(stage)


@task(name="world", task_run_name="small world", cache_policy=NO_CACHE)
def build_world(root: Path) -> Stage | State[Stage]:
    """Write the demo's data and pre-train its base model."""
    file = _progress_file(root, "world")
    watch = Watch("world", file)
    stage = in_lane(world_stage, root, file, watch=watch)
    announce("world", ENDED, 1, 1)
    watch.close("the small world and its base model are there")
    return _shown(stage)


@task(name="mix", task_run_name="mix · {cell.label}", cache_policy=NO_CACHE)
def mix(spec: ExperimentSpec, cell: Cell, curated: Stage) -> Stage | State[Stage]:
    """Draw the budgets of one cell and lay out its mixture."""
    stage = pipeline.mix_stage(spec, cell, curated)
    ledger = read_json(stage.path / "ledger.json")
    get_run_logger().info(
        "%s task tokens in %s examples, %s general tokens, %s steps",
        ledger["task_tokens"], ledger["num_task_examples"], ledger["general_tokens"],
        ledger["steps"],
    )  # fmt: skip
    return _shown(stage)


@task(
    name="train",
    task_run_name="train · {cell.label} · rate {settings.learning_rate}",
    cache_policy=NO_CACHE,
)
def train(
    spec: ExperimentSpec, cell: Cell, mixed: Stage, settings: Candidate
) -> Stage | State[Stage]:
    """Train one cell in a lane."""
    file = _progress_file(mixed.root, f"{cell.name}-{settings.learning_rate}-{settings.epochs}")
    watch = Watch(cell.label, file, read_json(mixed.path / "ledger.json")["rendered_tokens"])
    stage = in_lane(
        pipeline.train_stage, pipeline.settled(spec, settings), cell, mixed, file, watch=watch
    )
    summary = read_json(stage.path / "summary.json")
    watch.close(f"trained {summary['steps']:,} steps in {summary['train_seconds']:,.0f} s")
    get_run_logger().info(
        "%d steps in %.1f s, %.0f tokens/s, dev loss %s at step %s",
        summary["steps"], summary["train_seconds"], summary["tokens_per_second"],
        summary["kept_dev_loss"], summary["kept_step"],
    )  # fmt: skip
    return _shown(stage)


@task(name="evaluate", task_run_name="evaluate · {cell.label}", cache_policy=NO_CACHE)
def evaluate(
    spec: ExperimentSpec, cell: Cell, mixed: Stage, trained: Stage | None
) -> Stage | State[Stage]:
    """Generate and score the test items of one cell in a lane."""
    file = _progress_file(mixed.root, f"{cell.name}-evaluate")
    watch = Watch(cell.label, file)
    stage = in_lane(pipeline.evaluate_stage, spec, mixed, trained, file, watch=watch)
    watch.close("evaluated")
    scores = read_json(stage.path / "scores.json")
    get_run_logger().info("%s", {name: entry["score"] for name, entry in scores.items()})
    return _shown(stage)


@task(name="tune", task_run_name="tune · {cell.arm}", cache_policy=NO_CACHE)
def tune_arm(spec: ExperimentSpec, cell: Cell, curated: Stage) -> dict[str, Any]:
    """Compare learning rates and epochs of one arm on dev items."""
    trainings = [
        (settings, pipeline.unless_diverged(_mix_and_train, spec, cell, curated, settings))
        for settings in spec.training.candidates
    ]
    table = pipeline.compare_candidates(cell, trainings)
    announce(f"tuning · {cell.label}", DONE, 1, 1)
    return table


@task(name="cell", task_run_name="cell · {cell.label}", cache_policy=NO_CACHE)
def run_cell(
    spec: ExperimentSpec, cell: Cell, curated: Stage, tuning: Mapping[str, Any]
) -> CellOutcome:
    """Mix, train and evaluate one cell."""
    settings = pipeline.chosen_settings(spec, tuning, cell.arm)
    mixed = value_of(mix(pipeline.settled(spec, settings), cell, curated))
    tell_begun(partial(pipeline.expected_outcome, spec, cell, mixed, settings))
    is_trained = parse_arm(cell.arm).is_trained
    trained = value_of(train(spec, cell, mixed, settings)) if is_trained else None
    evaluated = value_of(evaluate(spec, cell, mixed, trained))
    announce(cell.label, DONE, 1, 1)
    return CellOutcome(cell, mixed, trained, evaluated, settings if is_trained else None)


@task(name="next round", task_run_name="next round", cache_policy=NO_CACHE)
def choose_round(spec: ExperimentSpec, outcomes: Sequence[CellOutcome]) -> Round | None:
    """What an adaptive run does next, by what the finished cells say."""
    step = round_after(spec, [outcome.record() for outcome in outcomes])
    get_run_logger().info("%s", step.reason if step else "the question is answered")
    return step


@task(name="analyse", task_run_name="analyse", cache_policy=NO_CACHE)
def analyse(
    spec: ExperimentSpec,
    root: Path,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    tuning: Mapping[str, Any],
    rounds: Sequence[Round],
) -> dict[str, Any]:
    """Write the results table, the leverage ratios and the emergence of items."""
    write_results(spec, root, curated, outcomes, tuning, rounds)
    return analyse_run([outcome.record() for outcome in outcomes], spec, root)


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def report(root: Path) -> Path:
    """Draw the HTML report."""
    return write_report(root)


def _mix_and_train(spec: ExperimentSpec, cell: Cell, curated: Stage, settings: Candidate) -> Stage:
    mixed = value_of(mix(pipeline.settled(spec, settings), cell, curated))
    return value_of(train(spec, cell, mixed, settings))


def value_of(result: T | State[T]) -> T:
    """What a task returned, whether it came as a value or in a state."""
    return result.result() if isinstance(result, State) else result


def _shown(stage: Stage) -> Stage | State[Stage]:
    if not stage.reused:
        return stage
    message = f"found finished: {stage.path.name}"
    return Completed(name="Reused", message=message, data=stage)


def _progress_file(root: Path, name: str) -> ProgressFile:
    return ProgressFile(root / "progress" / f"{name}.json")
