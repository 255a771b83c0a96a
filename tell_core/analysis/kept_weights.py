"""The trainings that kept their weights at every probe, and what is measured of them for P7.

A movement takes a backward for every unit and probe, so it is measured once and kept as a stage of
the run directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tell_core.analysis.registration import Split, task_units
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.sequence import BoolArray
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.spec.identity import fingerprint
from tell_core.store import find_stage, stage_path, write_stage

if TYPE_CHECKING:
    from tell_core.analysis.cells import AnalysedCell
    from tell_core.analysis.quanta.movement import Movement
    from tell_core.data.encoding import EncodedExamples
    from tell_core.spec.model import ExperimentSpec

MAX_GROUP_UNITS = 128
MIN_SEEDS = 2
_NUM_DIMENSIONS = 4096
_VERSION = 1
_FILE = "movement.npz"
_BASELINES = ("sft_matched", "sft")  # equal steps where the run has them

Progress = Callable[[str, int, int], None]


class Groups(NamedTuple):
    """The units that are looked at.

    Attributes:
        places: Shape (U,). Number of each unit among the task's units.
        is_shared: Shape (U,). Shared, else specific.
        items: Shape (U,). Item that a unit belongs to.
    """

    places: npt.NDArray[np.int64]
    is_shared: BoolArray
    items: npt.NDArray[np.int64]


def choose_groups(trace: CellTrace, split: Split) -> Groups:
    """As many shared as specific units of the task, at most `MAX_GROUP_UNITS`, by seeded choice."""
    units = task_units(trace)
    names = split.of(units.names)
    found = [np.flatnonzero(names == name) for name in ("shared", "specific")]
    size = min(MAX_GROUP_UNITS, *map(len, found))
    generator = np.random.default_rng(0)
    chosen = [np.sort(generator.permutation(places)[:size]) for places in found]
    places = np.concatenate(chosen).astype(np.int64)
    is_shared = np.arange(len(places)) < size
    return Groups(places, is_shared, units.items[places])


def cells_with_weights(run: RunCells, split: Split) -> dict[str, list[AnalysedCell]] | str:
    """Cells of `tell` and of SFT that kept their weights, seeds paired; or what is missing.

    At the smallest task budget and the largest general budget. SFT is `sft_matched`, the control
    of equal steps, where the run has it; else `sft`, but not the trainings that the split was read
    from: what they moved is what made units specific.

    Args:
        run: The cells.
        split: The registered split.
    """
    kept = {arm: _with_weights(run, arm) for arm in ("tell", *_BASELINES)}
    sft = next((arm for arm in _BASELINES if kept[arm]), None)
    if sft is None or not kept["tell"]:
        return (
            "arms tell and sft trained with `training.keep_probe_weights: true`, which keeps the"
            " weights at every probe"
        )
    if any(cell.name in split.cells for cell in kept[sft]):
        return (
            f"arm sft_matched with weights kept at its probes, or a task budget above"
            f" {run.task_budget:,} for sft: at this one the split was read from arm {sft}, whose"
            " trainings made units specific and cannot be what they are tested on"
        )
    seeds = sorted({c.seed for c in kept["tell"]} & {c.seed for c in kept[sft]})
    if len(seeds) < MIN_SEEDS:
        return f"at least {MIN_SEEDS} seeds of tell and {sft}; this run has {len(seeds)}"
    return {
        arm: sorted((c for c in kept[arm] if c.seed in seeds), key=lambda cell: cell.seed)
        for arm in ("tell", sft)
    }


def _with_weights(run: RunCells, arm: str) -> list[AnalysedCell]:
    return [
        cell
        for cell in run.of(arm, task_budget_tokens=run.task_budget)
        if cell.general_budget_tokens in (None, run.general_budget)
        and cell.trained is not None
        and (cell.trained / "probe_weights").is_dir()
    ]


def movement_of(
    spec: ExperimentSpec,
    cell: AnalysedCell,
    groups: Groups,
    root: Path,
    on_progress: Progress | None,
) -> Movement:
    """What a cell's training moved, measured once and kept as a stage.

    Args:
        spec: The experiment.
        cell: A cell of `cells_with_weights`.
        groups: The units to look at.
        root: The run directory.
        on_progress: Called with the cell's name, intervals done and their number.

    Raises:
        ModelError: Weights are missing or damaged.
    """
    from tell_core.analysis.quanta.movement import Movement

    assert cell.trained is not None, "only trained cells have kept weights"
    identity = fingerprint(
        "movement", _VERSION, cell.trained.name, cell.mixed.name, groups.places.tolist()
    )
    path = find_stage(root, "movement", identity)
    if path is None:
        with write_stage(root, "movement", identity) as out:
            _measure(spec, cell, groups, on_progress).save(out / _FILE)
        path = stage_path(root, "movement", identity)
    return Movement.load(path / _FILE)


def _measure(
    spec: ExperimentSpec, cell: AnalysedCell, groups: Groups, on_progress: Progress | None
) -> Movement:
    from tell_core.analysis.quanta.loading import load_subject
    from tell_core.analysis.quanta.movement import measure_movement
    from tell_core.analysis.quanta.projection import CountSketch
    from tell_core.training.devices import resolve_device
    from tell_core.training.loop import probe_weights

    trace, trained = read_trace(cell), cell.trained
    assert trace is not None and trained is not None, "the cell was trained"
    device = resolve_device(spec.training.device)

    def load(step: int) -> Any:
        model, _ = load_subject(
            spec.model.id,
            revision=spec.model.revision,
            trained=probe_weights(trained, step),
            device=device,
        )
        return model

    return measure_movement(
        load,
        trace.steps.tolist(),
        unit_samples(cell, trace, groups),
        CountSketch(_NUM_DIMENSIONS),
        device=device,
        on_progress=(lambda *done: on_progress(f"directions of {cell.name}", *done))
        if on_progress
        else None,
    )


def unit_samples(cell: AnalysedCell, trace: CellTrace, groups: Groups) -> EncodedExamples:
    """Each unit as the cell's model sees it: an item, or an item cut behind its traced token."""
    from tell_core.analysis.quanta.tokens import TokenSelection, token_samples
    from tell_core.data.encoding import EncodedExamples

    examples = EncodedExamples.load(cell.mixed / "probe.safetensors")
    if not trace.token_losses.size:
        return examples.select(groups.items)
    of_task = np.flatnonzero(trace.is_task[trace.token_items])[groups.places]
    rows = trace.token_items[of_task]
    positions = examples.response_starts[rows] + trace.token_positions[of_task]
    nothing = np.zeros(len(rows))
    return token_samples(examples, TokenSelection(rows, positions, nothing, {}))
