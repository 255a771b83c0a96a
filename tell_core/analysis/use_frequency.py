"""P3: the more often a skill is used in general data, the earlier it is learned."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from tell_core.analysis.cells import AnalysedCell, read_lines
from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.run_cells import RunCells, needs_seeds, traced
from tell_core.analysis.sequence import IntArray, LearningTimes, learning_times
from tell_core.analysis.time_regression import Observations, coefficient, joined
from tell_core.analysis.traces import CellTrace
from tell_core.analysis.verdicts import CLAIMS, Finding, unmeasured
from tell_core.errors import AnalysisError

MIN_LABELS = 5


def time_by_frequency(run: RunCells, curated: Path | None) -> Finding:
    """P3: censored regression of the learning time of general items on their use frequency.

    The frequency is the share of the curated general data that has the item's value in
    `analysis.quantum_column`; items of one value are drawn together, and seeds from Student's t.
    """
    column = run.spec.analysis.quantum_column
    if column is None:
        return unmeasured("P3", "`analysis.quantum_column`: the column that names an item's skill")
    frequencies = use_frequencies(curated, column)
    cells = traced(
        run.of("tell", task_budget_tokens=run.task_budget, general_budget_tokens=run.general_budget)
    )
    if (needs := needs_seeds(cells)) is not None:
        return unmeasured("P3", needs)
    parts = [_labelled_times(cell, trace, column, frequencies) for cell, trace in cells]
    named = [label for _, found in parts for label in found]
    if len(set(named)) < MIN_LABELS:
        return unmeasured(
            "P3", f"held-out general items of at least {MIN_LABELS} skills with something to learn;"
            f" this run has {len(set(named))}",
        )  # fmt: skip
    seeds = np.repeat([cell.seed for cell, _ in cells], [len(found) for _, found in parts])
    places = np.unique(named, return_inverse=True)[1].astype(np.int64)
    observed = Observations(joined([times for times, _ in parts]), places, seeds)
    log_p = np.log([frequencies[label] for label in named])
    design = np.stack([np.ones(len(named)), log_p], axis=1)
    try:
        beta = coefficient("β", observed, design, 1, run.resampling, sign=-1.0)
    except AnalysisError as error:
        return unmeasured("P3", str(error))
    remark = f"{len(named)} observations of {len(set(named))} skills in general data."
    figure = {"points": _points(named, log_p, observed.times)}
    return Finding("P3", CLAIMS["P3"], (beta,), remark=remark, figure=figure)


def _points(labels: Sequence[str], log_p: FloatArray, times: LearningTimes) -> list[dict[str, Any]]:
    columns = zip(labels, np.exp(log_p), np.expm1(times.log_times), times.is_learned, strict=True)
    return [
        {"skill": label, "frequency": float(p), "step": float(step), "is_learned": bool(learned)}
        for label, p, step, learned in columns
    ]


def use_frequencies(curated: Path | None, column: str) -> dict[str, float]:
    """Share of the curated general data of each value of a column."""
    if curated is None or not (curated / "general.parquet").is_file():
        return {}
    extras = pq.read_table(curated / "general.parquet", columns=["extra"])["extra"].to_pylist()
    counts = Counter(_label(json.loads(extra), column) for extra in extras)
    return {label: count / len(extras) for label, count in counts.items() if label}


def _label(extra: Mapping[str, Any], column: str) -> str:
    value = extra.get(column, "")
    return " > ".join(map(str, value)) if isinstance(value, list) else str(value)


class LabelledItems(NamedTuple):
    """The held-out general items of a training whose skill has a known use.

    Attributes:
        places: Shape (N,). Probe items with something to learn.
        labels: N skills.
        known: Skills all of whose items were known before training: there is nothing to learn.
    """

    places: IntArray
    labels: list[str]
    known: frozenset[str]


def labelled_items(
    cell: AnalysedCell, trace: CellTrace, column: str, frequencies: Mapping[str, float]
) -> LabelledItems:
    """General items with their skills.

    Items of a retention set may bear the same labels and are left out: they are not drawn from the
    general data whose shares the frequencies are.
    """
    labels = [
        _label(item["extra"], column) for item in read_lines(cell.mixed / "probe_items.jsonl")
    ]
    was_known = learning_times(trace.steps, trace.losses).was_known
    has_label = np.array([label in frequencies for label in labels])
    is_general = np.array([role == "general" for role in trace.roles])
    places = np.flatnonzero(has_label & is_general & ~was_known)
    unknown = [labels[place] for place in places]
    known = {labels[place] for place in np.flatnonzero(has_label & is_general & was_known)}
    return LabelledItems(places, unknown, frozenset(known.difference(unknown)))


def _labelled_times(
    cell: AnalysedCell, trace: CellTrace, column: str, frequencies: Mapping[str, float]
) -> tuple[LearningTimes, list[str]]:
    """Their learning times, with their labels."""
    found = labelled_items(cell, trace, column, frequencies)
    return learning_times(trace.steps, trace.losses).select(found.places), found.labels
