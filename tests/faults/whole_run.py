"""A whole experiment in one process that can be killed, and what of it has to come out equal."""

import multiprocessing
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tell_core.analysis.summary import analyse_run
from tell_core.pipeline import chosen_settings, curate_stage, run_cell, tune
from tell_core.results import open_run, sole_owner, write_results, write_spec
from tell_core.spec.cells import plan_cells
from tell_core.spec.identity import file_digest
from tell_core.spec.loading import load_spec
from tell_core.store import MARKER, read_json

# Imported by the work only when it needs them.
_LATE = (
    "datasets",
    "peft",
    "sacrebleu",
    "transformers.models.llama.modeling_llama",
    "sklearn.utils",
)
# Measured, not computed: they differ from run to run.
_MEASURED = ("train_seconds", "tokens_per_second", "peak_memory_bytes", "mlflow_run_id")
_MEASURED_FILES = ("log.jsonl", "summary.json")


def run_whole(spec_file: Path, root: Path) -> None:
    """From raw data to the analysis, without orchestrator, tracker and drawing."""
    spec = load_spec(spec_file)
    open_run(spec, root)
    with sole_owner(root):
        write_spec(spec, root)
        curated = curate_stage(spec, root)
        tuning = tune(spec, curated)
        outcomes = [
            run_cell(spec, cell, curated, chosen_settings(spec, tuning, cell.arm))
            for cell in plan_cells(spec)
        ]
        write_results(spec, root, curated, outcomes, tuning)
        analyse_run([outcome.record() for outcome in outcomes], spec, root)


def start_whole(spec_file: Path, root: Path) -> ForkServerProcess:
    """`run_whole` in a process of its own whose libraries are loaded already.

    So nearly all its time is the work itself, which is what a kill at a random moment is to hit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.whole_run", *_LATE])
    process = context.Process(target=run_whole, args=(spec_file, root))
    process.start()
    return process


def outputs(root: Path) -> dict[str, Any]:
    """Everything that a run computes, by file: digests of stage files, rows of the tables."""
    found: dict[str, Any] = {
        "results": [_computed(row) for row in pq.read_table(root / "results.parquet").to_pylist()],
        "leverage": read_json(root / "leverage.json"),
        "forecast": read_json(root / "forecast.json"),
        "emergence": read_json(root / "emergence.json"),
    }
    for path in sorted((root / "predictions").glob("*.parquet")):
        found[path.name] = pq.read_table(path).to_pylist()
    for path in sorted((root / "stages").rglob("*")):
        if path.is_file() and path.name != MARKER:
            is_measured = path.name in _MEASURED_FILES
            name = path.relative_to(root).as_posix()
            found[name] = None if is_measured else file_digest(path)
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the outputs that are not equal in both, or are only in one."""
    return sorted(name for name in one.keys() | other.keys() if _differ(one, other, name))


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return name not in one or name not in other or one[name] != other[name]


def _computed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _MEASURED}
