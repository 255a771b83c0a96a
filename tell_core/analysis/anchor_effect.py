"""What the anchor prompt does: separable hidden states, and a gain that goes with them (P4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tell_core.analysis.cells import read_lines
from tell_core.analysis.multiple import two_sided_p_value
from tell_core.analysis.resampling import FloatArray, interval, seed_deviations
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import CLAIMS, Component, Finding, unmeasured
from tell_core.errors import AnalysisError

if TYPE_CHECKING:
    from tell_core.analysis.cells import AnalysedCell
    from tell_core.analysis.separability import Separability

ANCHOR_ARMS = ("tell", "tell_no_anchor", "tell_random_anchor", "sft")
SeedAreas = Mapping[str, Mapping[int, float]]  # by arm and seed
_NUM_PERMUTATIONS = 39  # a p-value of 0.025 can show; each costs five probes per model
_ANCHORED = {"tell": "anchor", "tell_random_anchor": "random text", "tell_no_anchor": "none",
             "sft": "own instruction"}  # fmt: skip


def anchor_mediates(run: RunCells) -> Finding:
    """P4: separability of hidden states with and without the anchor, and the gain it carries.

    Cells at the smallest task budget and the largest general budget. The first component is the
    gain that a random text of equal length does not give, the second the separability that the
    anchor adds to no anchor, the third the separability that it adds to the same random text; all
    must be above 0. Without the third, any prefix could make the states separable while the gain
    came from the anchor's words. The table compares anchor and general data two by two.
    """
    if missing := [arm for arm in ANCHOR_ARMS if not _cells(run, arm)]:
        return unmeasured("P4", f"arms {', '.join(missing)}")
    metric = run.spec.analysis.primary_metric
    gain = run.difference(
        metric, "tell", "tell_random_anchor", f"{metric}: tell minus tell_random_anchor"
    )
    seeds = [{cell.seed for cell in _cells(run, arm)} for arm in ANCHOR_ARMS[:2]]
    if gain is None or len(set.intersection(*seeds)) < 2:
        return unmeasured(
            "P4",
            "at least 2 seeds that tell shares with tell_no_anchor and tell_random_anchor each",
        )
    try:
        found = {arm: [_probe(run, cell) for cell in _cells(run, arm)] for arm in ANCHOR_ARMS}
    except AnalysisError as error:
        return unmeasured("P4", str(error))
    areas = {
        arm: {cell.seed: one.auc for cell, (one, _) in zip(_cells(run, arm), probes, strict=True)}
        for arm, probes in found.items()
    }
    added = [_added_area(run, areas, other) for other in ("tell_no_anchor", "tell_random_anchor")]
    return Finding(
        "P4",
        CLAIMS["P4"],
        (gain, *added),
        remark=_remark(run, metric, areas),
        figure={
            "table": [_table_row(run, metric, arm, found[arm]) for arm in ANCHOR_ARMS],
            "projections": {arm: found[arm][0][1] for arm in ANCHOR_ARMS},
        },
    )


def _cells(run: RunCells, arm: str) -> list[AnalysedCell]:
    """Trained cells of an arm at the chosen budgets, by seed."""
    found = [
        cell
        for cell in run.of(arm, task_budget_tokens=run.task_budget)
        if cell.general_budget_tokens in (None, run.general_budget) and cell.trained
    ]
    return sorted(found, key=lambda cell: cell.seed)


def _probe(run: RunCells, cell: AnalysedCell) -> tuple[Separability, list[dict[str, Any]]]:
    """Separability of the probe set's last prompt states in a cell's model, and their projection.

    The state is taken after half of the blocks; every probe item is a document of its own. Items
    of a retention set are left out: they belong to neither class.
    """
    from tell_core.analysis.quanta.loading import load_subject
    from tell_core.analysis.separability import last_prompt_states, projection, separability
    from tell_core.data.encoding import EncodedExamples
    from tell_core.training.devices import resolve_device

    model, _ = load_subject(
        run.spec.model.id,
        revision=run.spec.model.revision,
        trained=cell.trained,
        device=resolve_device(run.spec.training.device),
    )
    roles = [item["role"] for item in read_lines(cell.mixed / "probe_items.jsonl")]
    rows = np.flatnonzero([role in ("task", "general") for role in roles])
    examples = EncodedExamples.load(cell.mixed / "probe.safetensors").select(rows)
    layer = max(1, int(cast("Any", model).config.num_hidden_layers) // 2)
    states = last_prompt_states(model, examples, layer)
    is_task = np.asarray(examples.is_task, dtype=bool)
    found = separability(
        states, is_task, np.arange(len(examples)), num_permutations=_NUM_PERMUTATIONS
    )
    points = [
        {"x": float(x), "y": float(y), "role": "task" if task else "general"}
        for (x, y), task in zip(projection(states), is_task, strict=True)
    ]
    return found, points


def _added_area(run: RunCells, areas: SeedAreas, other: str) -> Component:
    """Area of `tell` minus that of another arm, seeds paired."""
    seeds = sorted(areas["tell"].keys() & areas[other].keys())
    differences = np.array([areas["tell"][seed] - areas[other][seed] for seed in seeds])
    name = f"AUC of task against general states: tell minus {other}"
    return _seed_component(name, differences, run)


def _seed_component(name: str, differences: FloatArray, run: RunCells) -> Component:
    """Mean difference over seeds, with Student's interval from draws."""
    draws = differences.mean() + seed_deviations(len(differences), run.resampling) @ differences
    low, high = interval(draws, draws, run.resampling.confidence)
    estimate = float(differences.mean())
    p_value = two_sided_p_value(draws, draws) if np.ptp(draws) > 0 else 1.0
    return Component(name, estimate, low, high, p_value, estimate > 0)


def _table_row(
    run: RunCells, metric: str, arm: str, probes: list[tuple[Separability, list[dict[str, Any]]]]
) -> dict[str, Any]:
    point = run.point(metric, arm)
    return {
        "arm": arm,
        "on_task_prompts": _ANCHORED[arm],
        "has_general_data": arm != "sft",
        "auc": float(np.mean([one.auc for one, _ in probes])),
        "auc_p_value": max(one.p_value for one, _ in probes),
        "score": float(point.scores.mean()) if point is not None else None,
    }


def _remark(run: RunCells, metric: str, areas: SeedAreas) -> str:
    """The share of the gain that goes with the anchor, and whether the probe is at its ceiling."""
    scores = {
        arm: float(point.scores.mean())
        for arm in ANCHOR_ARMS
        if (point := run.point(metric, arm)) is not None
    }
    whole = scores["tell"] - scores["sft"]
    words = (
        f"Of TELL's gain over SFT, {whole:+.2f}, {scores['tell_no_anchor'] - scores['sft']:+.2f}"
        f" remains without an anchor and {scores['tell_random_anchor'] - scores['sft']:+.2f} with"
        " a random text. That gain and separability appear in the same arm is measured; that the"
        " one brings the other is not."
    )
    if min(areas["tell_no_anchor"].values()) > 0.99:
        words += (
            " Task and general prompts are told apart without any anchor (AUC above 0.99): on these"
            " data the anchor has nothing left to add to separability."
        )
    return words
