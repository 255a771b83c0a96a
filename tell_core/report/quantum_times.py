"""When candidate quanta are learned in every seed of their arm, from the run's loss traces."""

from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np

from tell_core.analysis.resampling import student_interval
from tell_core.analysis.sequence import learning_times
from tell_core.report.reading import Json
from tell_core.store import read_json

_CONFIDENCE = 0.95
_MEANS = """
    SELECT tokens.cluster, traces.seed, traces.step, avg(traces.loss)
    FROM read_parquet(?) AS traces JOIN read_parquet(?) AS tokens
    ON traces.item_id = tokens.item_id AND traces.position = tokens.position
    WHERE list_contains(?, traces.cell::VARCHAR)
    GROUP BY ALL ORDER BY ALL
"""
Curve = tuple[list[int], list[float]]


def times_over_seeds(root: Path, name: str, tokens: Path) -> dict[int, Json]:
    """When the mean loss of each cluster's traced tokens halves, over the seeds of a cell's arm.

    Args:
        root: Directory of the run, or where the quanta of a model are.
        name: Name of the cell; its arm and budgets say which trainings count.
        tokens: ``tokens.parquet`` of the discovery.

    Returns:
        By label of the cluster ``step`` (geometric mean of step + 1, less 1), ``low`` and ``high``
        (Student's interval; null with one training; ``high`` null where one does not learn it),
        ``num_seeds`` and ``num_learned``. Clusters without traced tokens, and those known before,
        are not in it; nothing is without traces.
    """
    manifest = root / "manifest.json"
    cells: Json = read_json(manifest).get("cells", {}) if manifest.is_file() else {}
    if name not in cells or not (root / "traces.parquet").is_file() or not tokens.is_file():
        return {}
    fields = ("arm", "task_budget_tokens", "general_budget_tokens")
    alike = [
        other for other, cell in cells.items() if all(cell[f] == cells[name][f] for f in fields)
    ]
    given = [str(root / "traces.parquet"), str(tokens), alike]
    with duckdb.connect() as connection:
        rows = connection.execute(_MEANS, given).fetchall()
    curves: dict[int, dict[int, Curve]] = {}
    for label, seed, step, loss in rows:
        steps, losses = curves.setdefault(label, {}).setdefault(seed, ([], []))
        steps.append(step)
        losses.append(loss)
    times = {label: _time(by_seed) for label, by_seed in curves.items()}
    return {label: time for label, time in times.items() if time is not None}


def _time(by_seed: Mapping[int, Curve]) -> Json | None:
    found = [
        learning_times(np.array(steps), np.array(losses)[:, None])
        for steps, losses in by_seed.values()
    ]
    if any(one.was_known[0] for one in found):
        return None
    log_times = np.array([one.log_times for one in found])
    step, low, high = (float(end[0]) for end in np.expm1(student_interval(log_times, _CONFIDENCE)))
    num_learned = sum(bool(one.is_learned[0]) for one in found)
    is_open = np.isnan(low)
    return {
        "step": step,
        "low": None if is_open else max(low, 0.0),
        "high": None if is_open or num_learned < len(found) else high,
        "num_seeds": len(found),
        "num_learned": num_learned,
    }
