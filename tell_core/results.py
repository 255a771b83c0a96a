"""The run directory's tables: manifest, results, predictions; and questions to them in SQL."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from tell_core.analysis.adaptive import Round, left_out
from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.traces import TRACES_FILE, write_traces
from tell_core.data.curation import curation_inputs
from tell_core.errors import InputError, StoreError
from tell_core.evaluation.metrics import build_metrics
from tell_core.pipeline import STAGE_VERSIONS, CellOutcome, Stage, base_digest, renderer_of
from tell_core.spec.identity import canonical_json, file_digest, fingerprint
from tell_core.spec.loading import dump_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import explain_disk_errors, is_intact, read_json, write_json, write_text

RESULTS_SCHEMA = pa.schema(
    [
        ("experiment", pa.string()),
        ("cell", pa.string()),
        ("arm", pa.string()),
        ("task_budget_tokens", pa.int64()),
        ("task_tokens", pa.int64()),
        ("general_budget_tokens", pa.int64()),
        ("general_tokens", pa.int64()),
        ("supervised_tokens", pa.int64()),
        ("num_task_examples", pa.int64()),
        ("task_epochs", pa.float64()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("num_items", pa.int64()),
        ("train_seconds", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("peak_memory_bytes", pa.int64()),
        ("mlflow_run_id", pa.string()),
    ]
)
FINAL_FILES = (
    "spec.resolved.yaml",
    "manifest.json",
    "results.parquet",
    "leverage.json",
    "forecast.json",
    "emergence.json",
    "report.html",
)
_SEAL = "finished.json"
_OWNER = "experiment.json"
_LEDGER_COLUMNS = (
    "task_tokens",
    "general_tokens",
    "supervised_tokens",
    "num_task_examples",
    "task_epochs",
    "steps",
)
_TRAINING_COLUMNS = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
_VERSIONED = ("tell", "torch", "transformers", "peft", "datasets", "duckdb", "prefect", "mlflow")


SCORES_SQL = """
select metric, arm, task_budget_tokens, general_budget_tokens,
       round(avg(score), 4) as mean_score, round(stddev_samp(score), 4) as sd_over_seeds,
       count(*) as num_seeds
from results
group by all
order by metric, arm, task_budget_tokens, general_budget_tokens
"""
"""Mean score of every arm and budget."""


def default_root(spec: ExperimentSpec) -> Path:
    """Where an experiment's outputs go unless told otherwise."""
    return Path("runs") / spec.name


@contextmanager
def sole_owner(root: Path) -> Iterator[None]:
    """Hold the run directory; the lock ends with the process that holds it.

    Raises:
        StoreError: Another run holds it.
    """
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreError(
            f"another run is working in {root}: wait for it to end, then run the same command"
            " again; what it finished is reused"
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_run(spec: ExperimentSpec, root: Path) -> None:
    """Make the run directory, or check that it belongs to this experiment.

    Raises:
        InputError: The directory holds another experiment, or something else altogether; or the
            specification names a metric that does not exist.
        StoreError: It cannot be written.
    """
    check_metrics(spec)
    owner = root / _OWNER
    if owner.exists():
        name = read_json(owner)["experiment"]
        if name != spec.name:
            raise InputError(
                f"{root} holds the experiment {name!r}, but this specification is named"
                f" {spec.name!r}: choose another --out, or rename the experiment"
            )
    elif root.exists() and any(root.iterdir()) and not (root / "stages").is_dir():
        raise InputError(
            f"{root} is not empty and is no run directory: choose another --out for the results"
        )
    with explain_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    if not owner.exists():
        write_json(owner, {"experiment": spec.name})


def write_spec(spec: ExperimentSpec, root: Path) -> None:
    """Keep the resolved specification of the run that is about to be made."""
    write_text(root / "spec.resolved.yaml", dump_spec(spec))


def check_metrics(spec: ExperimentSpec) -> None:
    """Know before anything runs that every metric exists.

    Raises:
        InputError: An unknown metric, or a primary metric that is not among those computed.
    """
    names = [metric.name for metric in build_metrics(spec.evaluation)]
    primary = spec.analysis.primary_metric
    if primary not in names:
        raise InputError(
            f"`analysis.primary_metric` is {primary!r}, which is not computed: add it to"
            f" `evaluation.metrics`, or take one of {', '.join(names)}"
        )


def write_results(
    spec: ExperimentSpec,
    root: Path,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    tuning: Mapping[str, Any],
    rounds: Sequence[Round] = (),
) -> Path:
    """Write results.parquet, predictions/ and manifest.json from the cells' stages.

    Args:
        spec: The experiment.
        root: The run directory.
        curated: Its data.
        outcomes: Its cells.
        tuning: The comparison of candidates, by arm.
        rounds: How an adaptive run chose its cells; empty for a full grid.
    """
    rows = [row for outcome in outcomes for row in _result_rows(spec, outcome)]
    write_parquet(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA), root / "results.parquet")
    for outcome in outcomes:
        _write_predictions(outcome, root / "predictions" / f"{outcome.cell.name}.parquet")
    _drop_stale_predictions(root, {outcome.cell.name for outcome in outcomes})
    write_traces(
        (AnalysedCell.from_record(outcome.record()) for outcome in outcomes), root / TRACES_FILE
    )
    manifest = _manifest(spec, curated, outcomes, tuning)
    if rounds:
        manifest["adaptive"] = _adaptive_record(spec, rounds)
        manifest["commands"] = [f"{command} --adaptive" for command in manifest["commands"]]
    write_json(root / "manifest.json", manifest)
    return root / "results.parquet"


def note_runs(root: Path, run_ids: Mapping[str, str]) -> None:
    """Write each cell's MLflow run id into results.parquet."""
    rows = pq.read_table(root / "results.parquet").to_pylist()
    for row in rows:
        row["mlflow_run_id"] = run_ids.get(row["cell"])
    write_parquet(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA), root / "results.parquet")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Replace a Parquet file in one step."""
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, aside, compression="zstd")
        aside.replace(path)


def query(root: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answer a question in SQL over the views ``results``, ``predictions`` and ``traces`` of a run.

    Returns:
        Column names and rows.

    Raises:
        InputError: There are no results, or the SQL is wrong.
    """
    results = root / "results.parquet"
    if not results.exists():
        raise InputError(f"no results in {root}: run `tell run` first, or give a run directory")
    with closing(duckdb.connect(":memory:")) as connection:
        _view(connection, "results", results)
        if any((root / "predictions").glob("*.parquet")):
            _view(connection, "predictions", root / "predictions" / "*.parquet")
        if (root / TRACES_FILE).exists():
            _view(connection, "traces", root / TRACES_FILE)
        try:
            cursor = connection.execute(sql)
            return [column[0] for column in cursor.description], cursor.fetchall()
        except duckdb.Error as error:
            raise InputError(f"the SQL cannot be answered: {error}") from error


def _view(connection: Any, name: str, path: Path) -> None:
    quoted = str(path).replace("'", "''")
    connection.execute(
        f"create view {name} as select * from read_parquet('{quoted}', union_by_name = true)"
    )


def _result_rows(spec: ExperimentSpec, outcome: CellOutcome) -> list[dict[str, Any]]:
    cell = outcome.cell
    ledger = read_json(outcome.mixed.path / "ledger.json")
    training = read_json(outcome.trained.path / "summary.json") if outcome.trained else {}
    shared = {
        "experiment": spec.name,
        "cell": cell.name,
        "arm": cell.arm,
        "task_budget_tokens": cell.task_budget_tokens,
        "general_budget_tokens": cell.general_budget_tokens,
        "seed": cell.seed,
        "mlflow_run_id": None,
        **{name: ledger.get(name) for name in _LEDGER_COLUMNS},
        **{name: training.get(name) for name in _TRAINING_COLUMNS},
    }
    scores = read_json(outcome.evaluated.path / "scores.json")
    return [
        shared | {"metric": name, "score": entry["score"], "num_items": entry["num_items"]}
        for name, entry in scores.items()
    ]


def _write_predictions(outcome: CellOutcome, path: Path) -> None:
    lines = (outcome.evaluated.path / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [
        {"cell": outcome.cell.name} | {name: _flat(value) for name, value in row.items()}
        for row in map(json.loads, lines.splitlines())
    ]
    write_parquet(pa.Table.from_pylist(rows), path)


def _flat(value: Any) -> Any:
    """Nested values become JSON text: their shape differs from item to item."""
    return canonical_json(value) if isinstance(value, dict | list) else value


def _drop_stale_predictions(root: Path, names: set[str]) -> None:
    for path in (root / "predictions").glob("*.parquet"):
        if path.stem not in names:
            path.unlink()


def _manifest(
    spec: ExperimentSpec,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    tuning: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "experiment": spec.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in _VERSIONED}
        | {"python": platform.python_version()},
        "git_commit": git_commit(),
        "hardware": hardware(),
        "stages": {"curate": curated.path.name},
        "cells": {outcome.cell.name: _cell_record(outcome) for outcome in outcomes},
        "tuning": dict(tuning),
        "commands": [f"tell run {curated.root / 'spec.resolved.yaml'} --out {curated.root}"],
    }


def _adaptive_record(spec: ExperimentSpec, rounds: Sequence[Round]) -> dict[str, Any]:
    """Which cells were run, why, and which of the full grid were not needed."""
    run = [cell for step in rounds for cell in step.cells]
    return {
        "rounds": [
            {"reason": step.reason, "cells": [cell.name for cell in step.cells]} for step in rounds
        ],
        "left_out": [cell.name for cell in left_out(spec, run)],
    }


def _cell_record(outcome: CellOutcome) -> dict[str, Any]:
    cell = outcome.cell
    return {
        "arm": cell.arm,
        "task_budget_tokens": cell.task_budget_tokens,
        "general_budget_tokens": cell.general_budget_tokens,
        "seed": cell.seed,
        "mix": outcome.mixed.path.name,
        "train": outcome.trained.path.name if outcome.trained else None,
        "evaluate": outcome.evaluated.path.name,
        "ledger": read_json(outcome.mixed.path / "ledger.json"),
        "learning_rate": outcome.settings.learning_rate if outcome.settings else None,
        "epochs": outcome.settings.epochs if outcome.settings else None,
        "batches": _batches(outcome.trained),
    }


def _batches(trained: Stage | None) -> dict[str, Any] | None:
    """In what forward passes the cell was trained."""
    if trained is None:
        return None
    summary = read_json(trained.path / "summary.json")
    return {name: summary[name] for name in ("batching", "forward_passes", "padding_share")}


def hardware() -> dict[str, Any]:
    """What the run was made on."""
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Commit of the project's checkout, or None when it is installed from a wheel."""
    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None if found.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_run(root: Path) -> dict[str, Any]:
    """The manifest of a finished run.

    Raises:
        InputError: There is none.
    """
    try:
        manifest: dict[str, Any] = read_json(root / "manifest.json")
    except StoreError as error:
        raise InputError(
            f"{root} holds no finished run: give the directory that `tell run` printed"
        ) from error
    return manifest


def seal_run(
    spec: ExperimentSpec,
    root: Path,
    curated: Stage,
    outcomes: Sequence[CellOutcome],
    *,
    tracked_at: str | None,
    is_adaptive: bool = False,
) -> None:
    """Note that the run is finished, with what it was made from and what it consists of."""
    stages = [curated]
    for outcome in outcomes:
        stages += [outcome.mixed, outcome.evaluated]
        stages += [outcome.trained] if outcome.trained else []
    seal = {
        "identity": run_identity(spec, is_adaptive=is_adaptive),
        "tracked_at": tracked_at,
        "stages": sorted({stage.path.name for stage in stages}),
        "files": {name: file_digest(root / name) for name in FINAL_FILES},
    }
    write_json(root / _SEAL, seal)


def is_finished(
    spec: ExperimentSpec, root: Path, *, tracked_at: str | None, is_adaptive: bool = False
) -> bool:
    """Whether a run of exactly this specification on exactly these data lies there, whole.

    Raises:
        InputError: A source or the base model is missing: better known before anything starts.
    """
    identity = run_identity(spec, is_adaptive=is_adaptive)
    if not (root / _SEAL).exists():
        return False
    seal = read_json(root / _SEAL)
    if seal["identity"] != identity or (tracked_at and seal["tracked_at"] != tracked_at):
        return False
    files = (root / name for name in FINAL_FILES)
    if not all(path.exists() and file_digest(path) == seal["files"][path.name] for path in files):
        return False
    return all(is_intact(root / "stages" / name) for name in seal["stages"])


def run_identity(spec: ExperimentSpec, *, is_adaptive: bool = False) -> str:
    """Fingerprint of a whole run: specification, data, base model and versions of the stages.

    Data and model enter by their content, never by where they lie.
    """
    fields = spec.model_dump(mode="json")
    del fields["model"]["id"], fields["model"]["chat_template"]
    task = fields["task"]
    general = [*fields["general"], *fields["retention"]]
    for source in [*general, task["train"], task["test"], task["dev"] or {}]:
        source.pop("path", None)
    return fingerprint(
        fields,
        curation_inputs(spec),
        base_digest(spec.model.id, spec.model.revision),
        renderer_of(spec).digest,
        STAGE_VERSIONS,
        is_adaptive,
    )


def _decision(source: Mapping[str, Any]) -> str:
    """The format of a source, whether it was found or given, and which column is what."""
    columns = ", ".join(
        ours if ours == theirs else f"{ours} = {theirs}"
        for ours, theirs in source["columns"].items()
    )
    how = "found" if source["format_given"] == "auto" else "given"
    return f"{source['format']} ({how}: {columns})"


def source_rows(curated: Path) -> list[dict[str, Any]]:
    """One row per source for a table: what was read, kept and set aside."""
    return [
        {
            "source": source["name"],
            "role": source["role"],
            "format": _decision(source),
            "read": source["num_read"],
            "kept": source["num_kept"],
            "tokens": source["num_tokens"],
            "set aside": ", ".join(f"{n} {reason}" for reason, n in source["rejects"].items()),
        }
        for source in read_json(curated / "profile.json")["sources"]
    ]
