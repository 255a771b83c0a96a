"""MLflow: a parent run per experiment, a child run per cell, and the model registry.

The only module (with `served_model`) that imports mlflow. Everything is read from finished
stage directories, in batches, after the work: tracking never stands in the way of training.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlflow
import pandas as pd
import pyarrow.parquet as pq
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import get_run_logger, task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from tasks.stores import SQLITE, tracking_uri, without_password
from tell_core.errors import InputError, StoreError, TellError
from tell_core.pipeline import CellOutcome, Stage, renderer_of
from tell_core.registered import (
    CARD_PAGE,
    ITEMS_FILE,
    VERSION_DIRECTORY,
    VERSION_FORMAT,
    write_version,
)
from tell_core.report_card import report_card
from tell_core.results import FINAL_FILES, git_commit
from tell_core.spec.model import ExperimentSpec
from tell_core.store import explain_disk_errors, read_json, write_json

if TYPE_CHECKING:
    from tell_core.analysis.quanta.stage import Found

logger = logging.getLogger(__name__)

_RECORD = "tracking.json"
_TOKENS = ".tokens.arrow"
_BATCH = 1000  # most metrics that one request to MLflow may carry
_MAX_DESCRIPTION = 4900  # MLflow's file and SQL stores take 5000 characters
_NUM_EXAMPLES = 2
_ABOUT = (
    "Each version: trained weights, anchor prompt and report card; not the base model, which is"
    " checked by its digest. `challenger` is the last one registered; `champion` moves by"
    " `tell promote` alone, when the paired lower bound on the same test items is above 0, or by"
    " force with a reason."
)
# Waits before recording is tried again: longer together than a server takes to be restarted.
_PATIENCE_SECONDS = [5.0, 20.0, 60.0]
_SERVED_MODEL = Path(__file__).with_name("served_model.py")
_LIBRARY = Path(__file__).parent.parent / "tell_core"
# What `tell_core` needs to load and ask a model.
_SERVED_WITH = (
    *("jinja2", "numpy", "pandas", "peft", "psutil", "pydantic", "pyyaml", "safetensors"),
    *("scipy", "torch", "transformers"),
)


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
    """Record each finished cell as a child run, once; returns the run id of every cell."""
    client = connect(root)
    record = read_record(root) or record
    known = _recorded(client, record)
    cells = {}
    for outcome in outcomes:
        key = (outcome.cell.name, outcome.evaluated.fingerprint)
        run_id = known.get(key) or _track_cell(client, record, outcome)
        cells[outcome.cell.name] = run_id
    write_json(root / _RECORD, {**record, "cells": cells})
    num_new = len(set(cells.values()) - set(known.values()))
    get_run_logger().info("%d child runs, %d of them new", len(cells), num_new)
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


def register_best(
    client: MlflowClient,
    spec: ExperimentSpec,
    root: Path,
    record: Mapping[str, Any],
    curated: Stage,
    outcomes: Sequence[CellOutcome],
) -> str | None:
    """Register the cell with the lowest dev loss, unless it is registered already."""
    trained = [outcome for outcome in outcomes if outcome.trained and _uses_task(outcome)]
    if not trained:
        return None
    best = min(trained, key=_dev_loss)
    assert best.trained is not None
    name = f"{spec.name}-{spec.task.name}"
    identity = best.trained.fingerprint
    for known in _versions(client, name):
        if _is_version_of(known.tags, identity):
            client.set_registered_model_alias(name, "challenger", known.version)
            return f"models:/{name}/{known.version}"
    info = _log_model(spec, root, record["parent"], curated, outcomes, best)
    registered = mlflow.register_model(info.model_uri, name, tags=_version_tags(spec, root, best))
    describe_version(client, name, str(registered.version), root / VERSION_DIRECTORY)
    client.set_registered_model_alias(name, "challenger", registered.version)
    return f"models:/{name}/{registered.version}"


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


def describe_version(client: MlflowClient, name: str, version: str, directory: Path) -> None:
    """Show the report card on the version's page, and on the model's what its versions are."""
    card = (directory / CARD_PAGE).read_text(encoding="utf-8")
    if len(card) > _MAX_DESCRIPTION:
        whole_lines = card[:_MAX_DESCRIPTION].rpartition("\n")[0]
        card = f"{whole_lines}\n\nThe rest stands in the artifact {VERSION_DIRECTORY}/{CARD_PAGE}."
    client.update_model_version(name, version, description=card)
    client.update_registered_model(name, description=_ABOUT)


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
    """Mark a parent run that did not finish; when that fails too, the first failure is told.

    A run that is marked as ended already is left as it is.
    """
    try:
        if record := read_record(root):
            client = connect(root)
            if client.get_run(record["parent"]).info.status == "RUNNING":
                client.set_terminated(record["parent"], status)
    except (TellError, MlflowException) as error:
        logger.warning("the MLflow run could not be marked as %s: %s", status, error)


def _log_curated(client: MlflowClient, run_id: str, curated: Path) -> None:
    """Log corpora, evidence and the page that shows them; tokens can be made again from these."""
    for path in sorted(curated.iterdir()):
        if not path.name.endswith(_TOKENS):
            client.log_artifact(run_id, str(path), "curate")


def _recorded(client: MlflowClient, record: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Run ids of finished children by cell and evaluation; what an interruption left is ended."""
    found = {}
    parent = f"tags.{MLFLOW_PARENT_RUN_ID} = '{record['parent']}'"
    token = None
    while True:
        page = client.search_runs(
            [record["experiment_id"]], parent, max_results=_BATCH, page_token=token
        )
        for run in page:
            if run.info.status == "FINISHED":
                key = (run.info.run_name, run.data.tags.get("tell.evaluate_fingerprint", ""))
                found[key] = run.info.run_id
            elif run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
        if not (token := page.token):
            return found


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


def _track_cell(client: MlflowClient, record: Mapping[str, Any], outcome: CellOutcome) -> str:
    cell = outcome.cell
    tags = {
        MLFLOW_PARENT_RUN_ID: record["parent"],
        "tell.kind": "cell",
        "tell.evaluate_fingerprint": outcome.evaluated.fingerprint,
    }
    run = client.create_run(record["experiment_id"], run_name=cell.name, tags=tags)
    run_id = str(run.info.run_id)
    parameters = {
        "arm": cell.arm,
        "task_budget_tokens": cell.task_budget_tokens,
        "general_budget_tokens": cell.general_budget_tokens,
        "seed": cell.seed,
        "learning_rate": outcome.settings.learning_rate if outcome.settings else None,
        "epochs": outcome.settings.epochs if outcome.settings else None,
    }
    client.log_batch(
        run_id, params=[Param(key, str(value)) for key, value in parameters.items()], tags=[]
    )
    metrics = list(_cell_metrics(outcome))
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
    client.log_artifacts(run_id, str(outcome.evaluated.path), "evaluate")
    if outcome.trained:
        client.log_artifacts(run_id, str(outcome.trained.path), "train")
    for name in ("ledger.json", "shuffle_proof.json", "samples.json"):
        if (outcome.mixed.path / name).exists():
            client.log_artifact(run_id, str(outcome.mixed.path / name), "mix")
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _cell_metrics(outcome: CellOutcome) -> Iterator[Metric]:
    finished = int(read_json(outcome.evaluated.path / "_SUCCESS")["finished"] * 1000)
    for name, entry in read_json(outcome.evaluated.path / "scores.json").items():
        yield from _metric(name, entry["score"], finished, 0)
    for name, value in read_json(outcome.mixed.path / "ledger.json").items():
        yield from _metric(f"ledger/{name}", value, finished, 0)
    if not outcome.trained:
        return
    for name, value in read_json(outcome.trained.path / "summary.json").items():
        yield from _metric(f"training/{name}", value, finished, 0)
    lines = (outcome.trained.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    # At most 200 points a curve: enough to see it, and SQLite takes 0.3 ms a point.
    stride = max(1, len(lines) // 200)
    for line in [*lines[::stride], lines[-1]]:
        entry = json.loads(line)
        for name in ("loss", "task_loss", "general_loss", "learning_rate", "grad_norm"):
            yield from _metric(name, entry.get(name), finished, entry["step"])


def _metric(name: str, value: Any, timestamp: int, step: int) -> Iterator[Metric]:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield Metric(_safe(name), float(value), timestamp, step)


def _safe(name: str) -> str:
    """MLflow's metric names know no plus sign."""
    return name.replace("++", "_plus_plus").replace("+", "_plus")


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


def _is_version_of(tags: Mapping[str, str], identity: str) -> bool:
    is_same = tags.get("tell.train_fingerprint") == identity
    return is_same and tags.get("tell.version_format") == VERSION_FORMAT


def _version_tags(spec: ExperimentSpec, root: Path, best: CellOutcome) -> dict[str, str]:
    """What tells versions apart in a list."""
    assert best.trained is not None
    card_metric = spec.analysis.primary_metric
    score = read_json(best.evaluated.path / "scores.json")[card_metric]["score"]
    return {
        "tell.train_fingerprint": best.trained.fingerprint,
        "tell.version_format": VERSION_FORMAT,
        "tell.experiment": spec.name,
        "tell.cell": best.cell.name,
        "tell.arm": best.cell.arm,
        "tell.seed": str(best.cell.seed),
        "tell.task_budget_tokens": str(best.cell.task_budget_tokens),
        "tell.general_budget_tokens": str(best.cell.general_budget_tokens),
        "tell.dev_loss": f"{_dev_loss(best):.6f}",
        "tell.primary_metric": card_metric,
        "tell.score": f"{score:.6g}",
        "tell.git_commit": git_commit() or "unknown",
        "tell.report": str(root.absolute() / "report.html"),
    }


def _uses_task(outcome: CellOutcome) -> bool:
    return outcome.cell.task_budget_tokens is not None


def _dev_loss(outcome: CellOutcome) -> float:
    assert outcome.trained is not None
    return float(read_json(outcome.trained.path / "summary.json")["kept_dev_loss"])


def _versions(client: MlflowClient, name: str) -> Sequence[Any]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _log_model(
    spec: ExperimentSpec,
    root: Path,
    parent: str,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    best: CellOutcome,
) -> Any:
    """Log weights and the files of the version; the input example is of the test set."""
    assert best.trained is not None
    card, serving = report_card(spec, root, curated, outcomes, best), _serving_config(spec, best)
    version = write_version(root, curated, outcomes, best, card, serving)
    with mlflow.start_run(run_id=parent):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_SERVED_MODEL),
            artifacts={"trained": str(best.trained.path), VERSION_DIRECTORY: str(version)},
            code_paths=[str(_LIBRARY)],
            model_config=serving,
            pip_requirements=[f"{name}=={installed(name)}" for name in _SERVED_WITH],
            signature=_signature(),
            input_example=pd.DataFrame({"prompt": _example_prompts(version / ITEMS_FILE)}),
        )


def _example_prompts(items: Path) -> list[str]:
    """Bare prompts of the first test items."""
    table = pq.read_table(items, columns=["prompt"]).slice(0, _NUM_EXAMPLES)
    return list(table["prompt"].to_pylist())


def _serving_config(spec: ExperimentSpec, best: CellOutcome) -> dict[str, Any]:
    path = Path(spec.model.id)
    return {
        "base_model": str(path.absolute()) if path.is_dir() else spec.model.id,
        "base_revision": spec.model.revision,
        "dtype": spec.model.dtype,
        "arm": best.cell.arm,
        "anchor_seed": best.cell.seed,
        "max_new_tokens": spec.evaluation.max_new_tokens,
        "stop": list(spec.evaluation.stop),
        "batch_size": spec.evaluation.batch_size,
        "chat_template": renderer_of(spec).chat_template,
    }


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "response")]),
    )
