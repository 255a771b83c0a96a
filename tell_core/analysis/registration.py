"""Which units of the task are shared with general data, by a rule that reads no TELL cell.

Shared: after training on general data alone, at the largest general budget, the unit's loss is at
most half of its loss before training. Specific: it is not, but it is after SFT at the largest task
budget. A unit counts as learned where it is in more than half of the seeds. The split reads the
probes of `general_only` and `sft` and nothing of any TELL arm. That is what *registered* means
here; the file is written when predictions are first measured, which is after the run has ended. It
has a digest and stands from then on: a split that comes out differently later is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tell_core.analysis.cells import AnalysedCell
from tell_core.analysis.resampling import FloatArray
from tell_core.analysis.sequence import LEARNED_SHARE, BoolArray, learning_times
from tell_core.analysis.traces import CellTrace, read_trace
from tell_core.errors import AnalysisError
from tell_core.spec.identity import fingerprint
from tell_core.store import read_json, write_json

SPLIT_FILE = "split.json"
Group = Literal["shared", "specific", "neither", "known"]
GROUPS: tuple[Group, ...] = ("shared", "specific", "neither", "known")
_RULE_KEYS = ("rule", "learned_share")
_RULE = (
    "shared: loss at most half of the base model's after general_only at the largest general"
    " budget; specific: not shared, and at most half after sft at the largest task budget; each in"
    " more than half of the seeds; known: at most 0.1 nats before training"
)


@dataclass(frozen=True)
class Units:
    """The traces of one training, unit by unit; task units only.

    Attributes:
        names: U names: item, and for tokens ``item/position``.
        items: Shape (U,). Number of the item that a unit belongs to.
        losses: Shape (P, U). In nats.
        steps: Shape (P,).
    """

    names: tuple[str, ...]
    items: npt.NDArray[np.int64]
    losses: FloatArray
    steps: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The registered split.

    Attributes:
        groups: Group of each unit, by name.
        digest: Fingerprint of rule, cells and groups.
        cells: Names of the cells that the rule read.
    """

    groups: Mapping[str, Group]
    digest: str
    cells: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> npt.NDArray[np.str_]:
        """Group of each unit named.

        Raises:
            AnalysisError: A unit is not in the split.
        """
        if missing := [name for name in names if name not in self.groups]:
            raise AnalysisError(
                f"{len(missing)} units are not in the registered split, {missing[0]!r} first:"
                " these cells trace other tokens"
            )
        return np.array([self.groups[name] for name in names])

    def counts(self) -> dict[str, int]:
        """Number of units of each group."""
        found = list(self.groups.values())
        return {group: found.count(group) for group in GROUPS}


def task_units(trace: CellTrace) -> Units:
    """The traced tokens of the task items; the items themselves where no tokens were traced."""
    if trace.token_losses.size:
        chosen = trace.is_task[trace.token_items]
        items = trace.token_items[chosen]
        places = zip(items, trace.token_positions[chosen], strict=True)
        names = tuple(f"{trace.items[item]}/{position}" for item, position in places)
        return Units(names, items, trace.token_losses[:, chosen], trace.steps)
    items = np.flatnonzero(trace.is_task)
    names = tuple(trace.items[item] for item in items)
    return Units(names, items, trace.losses[:, items], trace.steps)


def register_split(cells: Sequence[AnalysedCell], path: Path) -> Split:
    """Write the split of a run, or find the same one there; a file is never replaced.

    Args:
        cells: All cells of the run; only `general_only` and `sft` are read.
        path: File to write.

    Raises:
        AnalysisError: The run has no trained cells of these arms, the file was changed after it
            was written, or it holds another split.
    """
    general = _at_largest(cells, "general_only", "general_budget_tokens")
    sft = _at_largest(cells, "sft", "task_budget_tokens")
    names, by_general, known = _learned(general)
    _, by_task, _ = _learned(sft)
    chosen = np.select([known, by_general, by_task], ["known", "shared", "specific"], "neither")
    content: dict[str, Any] = {
        "rule": _RULE,
        "learned_share": LEARNED_SHARE,
        "cells": [cell.name for cell in (*general, *sft)],
        "groups": dict(zip(names, chosen.tolist(), strict=True)),
    }
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"digest": fingerprint(content), **content})
    elif changes := _changes(_verified(path), content):
        raise AnalysisError(
            f"{path} registers another split than this run has now: {'; '.join(changes)}. Restore"
            " the cells it was registered with, or remove the file to register the split anew"
        )
    return read_split(path)


def read_split(path: Path) -> Split:
    """Read a registered split.

    Raises:
        AnalysisError: It was changed after it was written.
    """
    content = _verified(path)
    return Split(content["groups"], fingerprint(content), tuple(content["cells"]))


def _verified(path: Path) -> dict[str, Any]:
    """What a split's file holds, without its digest, which has to be right."""
    content: dict[str, Any] = read_json(path)
    digest = content.pop("digest", None)
    if fingerprint(content) != digest:
        raise AnalysisError(
            f"{path} was changed after it was registered: its digest is not {digest}. Remove it to"
            " register the split anew"
        )
    return content


def _changes(registered: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, how two splits differ; empty where they are the same."""
    if registered == found:
        return []
    changes = []
    if [registered.get(k) for k in _RULE_KEYS] != [found[k] for k in _RULE_KEYS]:
        changes.append("the rule is another one")
    gone, new = (
        sorted(set(one.get("cells", ())) - set(other.get("cells", ())))
        for one, other in ((registered, found), (found, registered))
    )
    changes += [f"cell {name} is gone" for name in gone] + [f"cell {name} is new" for name in new]
    before, after = registered.get("groups", {}), found["groups"]
    moved = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if moved:
        changes.append(
            f"{len(moved)} units are in another group, {moved[0]!r} first (was"
            f" {before.get(moved[0], 'absent')}, is {after.get(moved[0], 'absent')})"
        )
    return changes or ["its cells stand in another order"]


def _at_largest(cells: Sequence[AnalysedCell], arm: str, budget: str) -> list[AnalysedCell]:
    """Trained cells of an arm at its largest budget, one per seed."""
    found = [cell for cell in cells if cell.arm == arm and cell.trained is not None]
    if not found:
        raise AnalysisError(f"the split into shared and specific needs arm {arm}")
    largest = max(getattr(cell, budget) for cell in found)
    return [cell for cell in found if getattr(cell, budget) == largest]


def _learned(cells: Sequence[AnalysedCell]) -> tuple[tuple[str, ...], BoolArray, BoolArray]:
    """Names of the units, whether most seeds end with half the loss, whether they were known."""
    traces = [trace for cell in cells if (trace := read_trace(cell)) is not None]
    units = [task_units(trace) for trace in traces]
    base = np.stack([one.losses[0] for one in units])
    last = np.stack([one.losses[-1] for one in units])
    is_learned = (last <= LEARNED_SHARE * base).mean(axis=0) > 0.5
    known = learning_times(units[0].steps, units[0].losses).was_known
    return units[0].names, np.asarray(is_learned), known
