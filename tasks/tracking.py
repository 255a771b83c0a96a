"""The MLflow run of an experiment, as tasks: opened, its cells recorded, closed.

What is recorded is read from stage directories. Cells are recorded while others train, see
`recording`; what is missing at the end is recorded here. MLflow is imported by this module,
`cell_runs`, `recording`, `registration`, `registry` and `served_model`, and by nothing else.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlflow
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from tasks.cell_runs import CellRuns, end_child_runs
from tasks.registration import register_best
from tasks.stores import SQLITE, tracking_uri, without_password
from tell_core.errors import InputError, StoreError, TellError
from tell_core.pipeline import CellOutcome, Stage
from tell_core.results import FINAL_FILES, git_commit
from tell_core.spec.model import ExperimentSpec
from tell_core.store import explain_disk_errors, read_json, write_json

if TYPE_CHECKING:
    from tell_core.analysis.quanta.stage import Found

logger = logging.getLogger(__name__)

_RECORD = "tracking.json"
_TOKENS = ".tokens.arrow"
# Waits before recording is tried again: longer together than a server takes to be restarted.
_PATIENCE_SECONDS = [5.0, 20.0, 60.0]
BRIEF_SECONDS = 10  # longest wait for an answer while others wait
# While others wait: each request is tried once, and says nothing on the console.
_BRIEF = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(BRIEF_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextmanager
def brief_requests() -> Iterator[None]:
    """Let no request of this process to MLflow take long while the block runs.

    MLflow reads its settings from the environment, at each request.
    """
    before = {name: os.environ.get(name) for name in _BRIEF}
    os.environ.update(_BRIEF)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def connect(root: Path, uri: str | None = None) -> MlflowClient:
    """A client of the tracking store; an SQLite store is created by one process only.

    Args:
        root: A run directory.
        uri: The store, where it is not that of the run directory.

    Raises:
        InputError: The store cannot be reached.
    """
    uri = uri or tracking_uri(root)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        if uri.startswith(SQLITE):
            with explain_disk_errors(root), FileLock(f"{uri.removeprefix(SQLITE)}.lock"):
                client = MlflowClient(uri, uri)
                client.search_experiments(max_results=1)
            return client
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise InputError(
            f"the MLflow store {without_password(uri)} cannot be used: {error}. Check"
            " MLFLOW_TRACKING_URI, or run with --no-track"
        ) from error
    return client


@task(
    name="track experiment",
    task_run_name="track experiment",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2.0, 10.0],
)
def open_experiment(spec: ExperimentSpec, root: Path, curated: Stage) -> dict[str, Any]:
    """Start the parent run, or take up the one this run directory already has; link its page."""
    record = _opened(spec, root, curated)
    if url := run_url(record):
        create_link_artifact(key="mlflow", link=url, link_text="The run in MLflow")
    return record


def _opened(spec: ExperimentSpec, root: Path, curated: Stage) -> dict[str, Any]:
    client = connect(root)
    record, uri = read_record(root), without_password(tracking_uri(root))
    if record and record["uri"] == uri and _exists(client, record["parent"]):
        client.update_run(record["parent"], status="RUNNING")
        return record
    experiment_id = _experiment_id(client, spec.name, root)
    tags = {"tell.kind": "experiment", "tell.git_commit": git_commit() or "unknown"}
    run = client.create_run(experiment_id, run_name=spec.name, tags=tags)
    client.log_artifact(run.info.run_id, str(root / "spec.resolved.yaml"))
    client.log_inputs(run.info.run_id, list(_datasets(curated)))
    record = {
        "uri": uri,
        "experiment_id": experiment_id,
        "parent": run.info.run_id,
        "cells": {},
    }
    write_json(root / _RECORD, record)
    return record


@task(
    name="track cells",
    task_run_name="track cells",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=_PATIENCE_SECONDS,
)
def track_cells(
    root: Path, record: Mapping[str, Any], outcomes: Sequence[CellOutcome]
) -> dict[str, str]:
    """Record the cells that are not recorded yet; returns the run id of every cell.

    Each has one child run, and none is left as running: what an interruption left behind, of cells
    that are no longer asked for too, is ended.
    """
    client = connect(root)
    record = read_record(root) or record
    runs = CellRuns(client, record)
    num_new = sum(not runs.is_finished(outcome) for outcome in outcomes)
    cells = {outcome.cell.name: runs.record(outcome) for outcome in outcomes}
    end_child_runs(client, record, "KILLED")
    write_json(root / _RECORD, {**record, "cells": cells})
    get_run_logger().info("%d child runs, %d of them recorded at the end", len(cells), num_new)
    return cells


@task(
    name="register",
    task_run_name="register",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=_PATIENCE_SECONDS,
)
def close_experiment(
    spec: ExperimentSpec,
    root: Path,
    record: Mapping[str, Any],
    curated: Stage,
    outcomes: Sequence[CellOutcome],
) -> str | None:
    """Log the run directory's files, register the best model as challenger, end the parent run.

    Returns:
        URI of the registered version, or None when nothing was trained on the task.
    """
    client = connect(root)
    parent = record["parent"]
    for name in FINAL_FILES:
        if (root / name).exists():
            client.log_artifact(parent, str(root / name))
    _log_curated(client, parent, curated.path)
    client.log_artifacts(parent, str(root / "predictions"), "predictions")
    _log_leverage(client, parent, read_json(root / "leverage.json"))
    uri = register_best(client, spec, root, record, curated, outcomes)
    write_json(root / _RECORD, {**(read_record(root) or record), "model_uri": uri})
    client.set_terminated(parent, "FINISHED")
    return uri


@contextmanager
def explained_recording(root: Path) -> Iterator[None]:
    """Turn what MLflow or its disk refuse into an error with the mend.

    Raises:
        StoreError: A record or a file was not taken.
    """
    try:
        with explain_disk_errors(root):
            yield
    except MlflowException as error:
        raise StoreError(
            f"the MLflow store {without_password(tracking_uri(root))} did not take a record or a"
            f" file: {error}. Results and report are in {root}. Look whether its disk is full, then"
            " run the same command again: it records what is missing"
        ) from error


@task(
    name="track quanta",
    task_run_name="track quanta · {found.name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2.0, 10.0],
)
def track_quanta(root: Path, found: "Found", page: Path) -> None:
    """Log the page, the clusters and their numbers to the experiment's run, if it has one."""
    record = read_record(root)
    if record is None or record["uri"] != without_password(tracking_uri(root)):
        get_run_logger().info("%s is not recorded in this MLflow store: nothing is logged", root)
        return
    client = connect(root)
    for file in (page, found.path / "summary.json", found.path / "clusters.json"):
        client.log_artifact(record["parent"], str(file), f"quanta/{found.name}")
    summary = found.summary
    numbers = ("num_clusters", "agreement", "output_agreement", "output_purity")
    for name in numbers:
        client.log_metric(record["parent"], f"quanta/{found.name}/{name}", summary[name])


def run_url(record: Mapping[str, Any]) -> str | None:
    """Page of the parent run, when the store is a server with pages."""
    uri = str(record["uri"])
    if not uri.startswith("http"):
        return None
    return f"{uri.rstrip('/')}/#/experiments/{record['experiment_id']}/runs/{record['parent']}"


def read_record(root: Path) -> dict[str, Any] | None:
    """Which MLflow runs belong to a run directory, or None before the first."""
    path = root / _RECORD
    return dict(read_json(path)) if path.exists() else None


def end_experiment(root: Path, status: Literal["FAILED", "KILLED"]) -> None:
    """Mark a run that did not finish, and its children; when that fails, the first failure is told.

    A run that is marked as ended already is left as it is.
    """
    try:
        if record := read_record(root):
            with brief_requests():
                client = connect(root)
                if client.get_run(record["parent"]).info.status == "RUNNING":
                    end_child_runs(client, record, status)
                    client.set_terminated(record["parent"], status)
    except (TellError, MlflowException) as error:
        logger.warning("the MLflow run could not be marked as %s: %s", status, error)


def _log_curated(client: MlflowClient, run_id: str, curated: Path) -> None:
    """Log corpora, evidence and the page that shows them; tokens can be made again from these."""
    for path in sorted(curated.iterdir()):
        if not path.name.endswith(_TOKENS):
            client.log_artifact(run_id, str(path), "curate")


def _experiment_id(client: MlflowClient, name: str, root: Path) -> str:
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    location = None
    if tracking_uri(root).startswith(SQLITE):
        location = (root.absolute().parent / "mlartifacts" / name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        # Another run of the same name made it in the meantime.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def _datasets(curated: Stage) -> Iterator[DatasetInput]:
    for source in read_json(curated.path / "profile.json")["sources"]:
        files = source.get("files") or []
        digest = files[0].get("sha256", "") if len(files) == 1 else curated.fingerprint
        dataset = Dataset(
            name=f"{source['role']}/{source['name']}",
            digest=str(digest)[:32] or curated.fingerprint,
            source_type="local",
            source=json.dumps({"uri": files[0].get("path", "")} if files else {}),
            profile=json.dumps(
                {"num_rows": source["num_kept"], "num_tokens": source["num_tokens"]}
            ),
        )
        yield DatasetInput(dataset, [InputTag("mlflow.data.context", source["role"])])


def _log_leverage(client: MlflowClient, run_id: str, leverage: Mapping[str, Any]) -> None:
    primary = leverage["metrics"].get(leverage["primary_metric"], {})
    metrics = [
        Metric(
            f"leverage/{arm}/{entry['baseline']}", entry["ratio"], 0, entry["task_budget_tokens"]
        )
        for arm, by_general in primary.get("arms", {}).items()
        for entries in by_general.values()
        for entry in entries
        if entry["ratio"] is not None
    ]
    client.log_batch(
        run_id,
        metrics=metrics,
        tags=[RunTag("tell.primary_metric", str(leverage["primary_metric"]))],
    )
