"""The child runs of an experiment's MLflow run: one for each cell and evaluation."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tell_core.pipeline import CellOutcome, Stage
from tell_core.store import MARKER, partial_path, read_json
from tell_core.training.trainer import LOG_FILE

_EVALUATION = "tell.evaluate_fingerprint"
_BATCH = 1000  # most metrics that one request to MLflow may carry
# Points of a curve: enough to see it, and SQLite takes 0.3 ms a point.
NUM_POINTS = 200
_IN_LOG = ("loss", "task_loss", "general_loss", "learning_rate", "grad_norm", "peak_memory_bytes")
_CURVES = (*_IN_LOG, "tokens_per_second")

_Key = tuple[str, str]


class CellRuns:
    """Child runs as they are in the store, and what this process adds to them.

    A run that another process left behind, even by a kill, is taken up and not made again. All
    that is recorded has the time at which it came about, so that recording it twice changes
    nothing.

    Args:
        client: Of the tracking store.
        record: Which experiment and parent run it is about.
    """

    def __init__(self, client: MlflowClient, record: Mapping[str, Any]) -> None:
        self._client = client
        self._record = record
        self._run_ids: dict[_Key, str] = {}
        self._finished: set[_Key] = set()
        self._next_steps: dict[_Key, int] = {}  # of those that this process has opened
        for run in child_runs(client, record):
            key = (str(run.info.run_name), run.data.tags.get(_EVALUATION, ""))
            if run.info.status == "FINISHED":
                self._finished.add(key)
                self._run_ids[key] = run.info.run_id
            elif key not in self._finished:
                self._run_ids[key] = run.info.run_id

    def is_finished(self, outcome: CellOutcome) -> bool:
        """Whether everything of a cell is recorded."""
        return _key(outcome) in self._finished

    def follow(self, outcome: CellOutcome) -> None:
        """Record the points that a training's log has gained; opens the cell's run.

        Args:
            outcome: What the cell has left or will leave behind.
        """
        key = _key(outcome)
        run_id = self._opened(key, outcome)
        if outcome.trained is None:
            return
        num_steps = int(read_json(outcome.mixed.path / "ledger.json")["steps"])
        fallback = _finished_at(outcome.trained) or time.time()
        points = curve_points(outcome.trained.path, num_steps, self._next_steps[key])
        while batch := list(islice(points, _BATCH // len(_CURVES))):
            metrics = [metric for entry in batch for metric in _point(entry, fallback)]
            self._client.log_batch(run_id, metrics=metrics)
            self._next_steps[key] = batch[-1]["step"] + 1

    def record(self, outcome: CellOutcome) -> str:
        """Record all of a finished cell, unless it is recorded; returns its run id."""
        key = _key(outcome)
        if key in self._finished:
            return self._run_ids[key]
        self.follow(outcome)
        run_id = self._run_ids[key]
        metrics = list(_single_values(outcome))
        for start in range(0, len(metrics), _BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        self._log_files(run_id, outcome)
        ended = _finished_at(outcome.evaluated)
        self._client.set_terminated(run_id, "FINISHED", _milliseconds(ended or time.time()))
        self._finished.add(key)
        return run_id

    def fail(self, outcome: CellOutcome) -> None:
        """Mark a cell that ended without an outcome."""
        if (run_id := self._run_ids.get(_key(outcome))) and not self.is_finished(outcome):
            self._client.set_terminated(run_id, "FAILED")

    def _opened(self, key: _Key, outcome: CellOutcome) -> str:
        if key in self._next_steps:
            return self._run_ids[key]
        next_step = 0
        if run_id := self._run_ids.get(key):
            self._client.update_run(run_id, status="RUNNING")
            steps = [point.step for point in self._client.get_metric_history(run_id, "loss")]
            next_step = max(steps, default=-1) + 1
        else:
            run_id = self._run_ids[key] = self._create(outcome)
        parameters = [Param(name, str(value)) for name, value in _axes(outcome).items()]
        self._client.log_batch(run_id, params=parameters)
        self._next_steps[key] = next_step
        return run_id

    def _create(self, outcome: CellOutcome) -> str:
        run = self._client.create_run(
            self._record["experiment_id"],
            start_time=_milliseconds(_began(outcome)),
            run_name=outcome.cell.name,
            tags={
                MLFLOW_PARENT_RUN_ID: self._record["parent"],
                "tell.kind": "cell",
                _EVALUATION: outcome.evaluated.fingerprint,
            },
        )
        return str(run.info.run_id)

    def _log_files(self, run_id: str, outcome: CellOutcome) -> None:
        self._client.log_artifacts(run_id, str(outcome.evaluated.path), "evaluate")
        if outcome.trained:
            self._client.log_artifacts(run_id, str(outcome.trained.path), "train")
        for name in ("ledger.json", "shuffle_proof.json", "samples.json"):
            if (outcome.mixed.path / name).exists():
                self._client.log_artifact(run_id, str(outcome.mixed.path / name), "mix")


def child_runs(client: MlflowClient, record: Mapping[str, Any]) -> Iterator[Run]:
    """All child runs of an experiment's run, newest first."""
    wanted = f"tags.{MLFLOW_PARENT_RUN_ID} = '{record['parent']}'"
    token = None
    while True:
        page = client.search_runs(
            [record["experiment_id"]], wanted, max_results=_BATCH, page_token=token
        )
        yield from page
        if not (token := page.token):
            return


def end_child_runs(client: MlflowClient, record: Mapping[str, Any], status: str) -> None:
    """Mark every child run that still counts as running."""
    for run in child_runs(client, record):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, status)


def curve_points(trained: Path, num_steps: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
    """Lines of a training's log that are drawn: evenly spaced, the last step always among them.

    Args:
        trained: Directory of the training, whether it is finished or under way.
        num_steps: Steps of the whole training; decides which are drawn.
        first_step: Steps before it are left out.

    Yields:
        A record of `StepRecord` each, at most ``NUM_POINTS + 1`` over the whole training.
    """
    stride = max(1, math.ceil(num_steps / NUM_POINTS))
    for step, line in enumerate(_log_lines(trained)):
        is_drawn = step % stride == 0 or step == num_steps - 1
        if step >= first_step and is_drawn and line.endswith("\n"):
            yield json.loads(line)


def _log_lines(trained: Path) -> Iterator[str]:
    """Lines of the log, wherever it lies by now; none while there is no log."""
    for directory in (partial_path(trained), trained):
        with suppress(FileNotFoundError), (directory / LOG_FILE).open(encoding="utf-8") as log:
            yield from log
            return


def _key(outcome: CellOutcome) -> _Key:
    return outcome.cell.name, outcome.evaluated.fingerprint


def _axes(outcome: CellOutcome) -> dict[str, Any]:
    """What the cells of a sweep differ in."""
    cell, settings = outcome.cell, outcome.settings
    return {
        "arm": cell.arm,
        "task_budget_tokens": cell.task_budget_tokens,
        "general_budget_tokens": cell.general_budget_tokens,
        "seed": cell.seed,
        "learning_rate": settings.learning_rate if settings else None,
        "epochs": settings.epochs if settings else None,
    }


def _began(outcome: CellOutcome) -> float:
    """When a cell began, in seconds since 1970; now, when nothing of it is there yet."""
    first = next(_log_lines(outcome.trained.path), "") if outcome.trained else ""
    if first.endswith("\n") and "finished" in (entry := json.loads(first)):
        return float(entry["finished"] - entry["seconds"])
    return _finished_at(outcome.trained or outcome.evaluated) or time.time()


def _finished_at(stage: Stage) -> float | None:
    """When a stage was finished, in seconds since 1970; None while it is not."""
    marker = stage.path / MARKER
    return float(read_json(marker)["finished"]) if marker.exists() else None


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _point(entry: Mapping[str, Any], fallback: float) -> Iterator[Metric]:
    """The curves at one step, at the time when the step was done.

    Args:
        entry: Line of the log.
        fallback: Time for logs of earlier versions, which hold none; in seconds since 1970.
    """
    timestamp = _milliseconds(entry.get("finished", fallback))
    speed = entry["tokens"] / entry["seconds"] if entry.get("seconds") else None
    for name in _CURVES:
        value = speed if name == "tokens_per_second" else entry.get(name)
        yield from _metric(name, value, timestamp, entry["step"])


def _single_values(outcome: CellOutcome) -> Iterator[Metric]:
    """Scores, ledger and summary, each at the time when its stage was finished."""
    scores = read_json(outcome.evaluated.path / "scores.json")
    yield from _values(outcome.evaluated, {name: entry["score"] for name, entry in scores.items()})
    yield from _values(outcome.mixed, read_json(outcome.mixed.path / "ledger.json"), "ledger/")
    if trained := outcome.trained:
        yield from _values(trained, read_json(trained.path / "summary.json"), "training/")


def _values(stage: Stage, values: Mapping[str, Any], prefix: str = "") -> Iterator[Metric]:
    timestamp = _milliseconds(_finished_at(stage) or time.time())
    for name, value in values.items():
        yield from _metric(f"{prefix}{name}", value, timestamp, 0)


def _metric(name: str, value: Any, timestamp: int, step: int) -> Iterator[Metric]:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield Metric(_safe(name), float(value), timestamp, step)


def _safe(name: str) -> str:
    """MLflow's metric names know no plus sign."""
    return name.replace("++", "_plus_plus").replace("+", "_plus")
