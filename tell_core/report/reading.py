"""What a run left on disk, read for the report.

Only files of the run directory are read. Every file but ``manifest.json`` may be absent: a part
that was never made is None or empty here and becomes a sentence in the report.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import yaml
from pyarrow import parquet

from tell_core.errors import InputError
from tell_core.report.formats import as_number
from tell_core.store import read_json

Json = dict[str, Any]

REJECTS_PER_REASON = 3
OVERLAP_EXAMPLES = 12


@dataclass(frozen=True)
class CellRecord:
    """One cell as the manifest lists it; ``mix``, ``train``, ``evaluate`` are stage directories."""

    name: str
    arm: str
    task_budget_tokens: int | None
    general_budget_tokens: int | None
    seed: int
    learning_rate: float | None
    ledger: Json
    mix: Path | None
    train: Path | None
    evaluate: Path | None


@dataclass(frozen=True)
class RunFiles:
    """The files of one run directory; None, zero or an empty tuple where a file is absent."""

    root: Path
    manifest: Json
    spec: Json
    spec_text: str
    cells: tuple[CellRecord, ...]
    results: tuple[Json, ...]
    leverage: Json | None
    forecast: Json | None
    emergence: Json | None
    profile: Json | None
    anchor: Json | None
    num_dev_examples: int
    num_dev_tokens: int
    rejects: tuple[Json, ...]
    overlap_counts: tuple[Json, ...]
    overlap: tuple[Json, ...]

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return str(self.manifest.get("experiment") or self.spec.get("name") or self.root.name)

    def cells_of(self, arm: str) -> tuple[CellRecord, ...]:
        """Cells of one arm, in the order of the manifest."""
        return tuple(cell for cell in self.cells if cell.arm == arm)


def read_run(run: Path) -> RunFiles:
    """Read what the report needs from the run directory ``run``.

    Raises:
        InputError: ``run`` holds no ``manifest.json``, so it is not the directory of a run.
        StoreError: A file is there but is not readable JSON.
    """
    if not (run / "manifest.json").is_file():
        raise InputError(
            f"{run} is not a run directory: it has no manifest.json. Give the directory that "
            "`tell run` wrote (runs/<experiment name>), or run the experiment first."
        )
    manifest = read_json(run / "manifest.json")
    spec_path = run / "spec.resolved.yaml"
    spec_text = spec_path.read_text(encoding="utf-8") if spec_path.is_file() else ""
    curate = stage_directory(run, (manifest.get("stages") or {}).get("curate"))
    num_dev_examples, num_dev_tokens = _dev_size(_inside(curate, "task_dev.parquet"))
    return RunFiles(
        root=run,
        manifest=manifest,
        spec=yaml.safe_load(spec_text) or {},
        spec_text=spec_text,
        cells=tuple(_cells(run, manifest)),
        results=rows_of(run / "results.parquet", "SELECT * FROM read_parquet(?)"),
        leverage=read_optional_json(run / "leverage.json"),
        forecast=read_optional_json(run / "forecast.json"),
        emergence=read_optional_json(run / "emergence.json"),
        profile=read_optional_json(_inside(curate, "profile.json")),
        anchor=read_optional_json(_inside(curate, "anchor.json")),
        num_dev_examples=num_dev_examples,
        num_dev_tokens=num_dev_tokens,
        rejects=_read_rejects(_inside(curate, "rejects.parquet")),
        overlap_counts=_read_overlap_counts(_inside(curate, "overlap.parquet")),
        overlap=_read_overlap(_inside(curate, "overlap.parquet")),
    )


def stage_directory(run: Path, name: object) -> Path | None:
    """Return the directory of a stage, always inside the run, or None when it is not there."""
    if not isinstance(name, str) or Path(name).name in ("", ".."):
        return None
    directory = run / "stages" / Path(name).name
    return directory if directory.is_dir() else None


def read_optional_json(path: Path | None) -> Any:
    """Return the content of a JSON file, or None when there is no such file."""
    return read_json(path) if path is not None and path.is_file() else None


def read_lines(path: Path | None) -> tuple[Json, ...]:
    """Return the objects of a JSON-lines file; a last line cut off by a kill is left out."""
    if path is None or not path.is_file():
        return ()
    with path.open(encoding="utf-8") as lines:
        return tuple(json.loads(line) for line in lines if line.endswith("\n") and line.strip())


def rows_of(path: Path | None, sql: str) -> tuple[Json, ...]:
    """Return the rows of a query whose one parameter is the Parquet file ``path``."""
    if path is None or not path.is_file():
        return ()
    with duckdb.connect() as connection:
        cursor = connection.execute(sql, [str(path)])
        names = [column[0] for column in cursor.description or ()]
        return tuple(dict(zip(names, row, strict=True)) for row in cursor.fetchall())


def has_predictions(run: RunFiles, cell: str) -> bool:
    """Whether the predictions of a cell are stored."""
    return _predictions_file(run, cell).is_file()


def read_predictions(run: RunFiles, cell: str) -> dict[str, Json]:
    """Return the predictions of a cell by item id, ``scores`` as an object; empty when absent."""
    if not has_predictions(run, cell):
        return {}
    # A DuckDB connection for each cell would take ten times as long.
    rows = parquet.read_table(_predictions_file(run, cell)).to_pylist()
    return {str(row["item_id"]): {**row, "scores": _as_object(row.get("scores"))} for row in rows}


def read_items(cell: CellRecord) -> dict[str, Json]:
    """Return the test items of a cell by item id, with prompt and reference."""
    rows = read_lines(_inside(cell.mix, "items.jsonl"))
    return {str(row.get("item_id")): row for row in rows}


def read_ledger(cell: CellRecord) -> Json:
    """Return the token ledger of a cell: its own file, else the manifest's copy."""
    return read_optional_json(_inside(cell.mix, "ledger.json")) or cell.ledger


def read_cell_json(directory: Path | None, name: str) -> Any:
    """Return a JSON file of a cell's stage directory, or None."""
    return read_optional_json(_inside(directory, name))


def read_training_log(cell: CellRecord) -> tuple[Json, ...]:
    """Return the training log of a cell, one object per step."""
    return read_lines(_inside(cell.train, "log.jsonl"))


def _predictions_file(run: RunFiles, cell: str) -> Path:
    return run.root / "predictions" / f"{Path(cell).name}.parquet"


def _inside(directory: Path | None, name: str) -> Path | None:
    return None if directory is None else directory / name


def _as_object(value: Any) -> Json:
    if isinstance(value, str):
        value = json.loads(value)
    return value if isinstance(value, dict) else {}


def _cells(run: Path, manifest: Json) -> Iterator[CellRecord]:
    for name, cell in (manifest.get("cells") or {}).items():
        yield CellRecord(
            name=name,
            arm=str(cell.get("arm", "")),
            task_budget_tokens=cell.get("task_budget_tokens"),
            general_budget_tokens=cell.get("general_budget_tokens"),
            seed=int(cell.get("seed") or 0),
            learning_rate=as_number(cell.get("learning_rate")),
            ledger=cell.get("ledger") or {},
            mix=stage_directory(run, cell.get("mix")),
            train=stage_directory(run, cell.get("train")),
            evaluate=stage_directory(run, cell.get("evaluate")),
        )


def _dev_size(path: Path | None) -> tuple[int, int]:
    """Return number and tokens of the task dev examples, zeros when they are not stored."""
    sql = "SELECT count(*) AS examples, coalesce(sum(num_tokens), 0) AS tokens FROM read_parquet(?)"
    for row in rows_of(path, sql):
        return int(row["examples"]), int(row["tokens"])
    return 0, 0


def _read_rejects(path: Path | None) -> tuple[Json, ...]:
    """Return the first rejects of each source and reason, never the whole file."""
    return rows_of(
        path,
        "SELECT source, file, line, reason, detail, text FROM (SELECT *, row_number() OVER "
        "(PARTITION BY source, reason ORDER BY file, line) AS place FROM read_parquet(?)) "
        f"WHERE place <= {REJECTS_PER_REASON} ORDER BY source, reason, file, line",
    )


def _read_overlap_counts(path: Path | None) -> tuple[Json, ...]:
    return rows_of(
        path,
        "SELECT source, against, matched_source, matched, dropped, count(*) AS num_examples "
        "FROM read_parquet(?) GROUP BY ALL ORDER BY ALL",
    )


def _read_overlap(path: Path | None) -> tuple[Json, ...]:
    return rows_of(
        path,
        "SELECT source, file, line, against, matched_source, matched_line, matched, text, dropped "
        f"FROM read_parquet(?) ORDER BY source, file, line LIMIT {OVERLAP_EXAMPLES}",
    )
