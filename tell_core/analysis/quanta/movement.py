"""Which units' losses a training moves its weights down, from the weights kept at its probes.

Between two probes the weights move by some matrix per linear layer. Its inner product with a unit's
negative gradient at the first of the two probes says how far the movement goes down that unit's
loss, to first order. Movements and gradients are projected by the same random map, so that nothing
of the size of the model is kept.

Shape letters: U units, K intervals between probes, D projected dimensions, O outputs and I inputs
of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tell_core.analysis.quanta.gradients import linear_layers, project_gradients
from tell_core.analysis.quanta.projection import Projection
from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.errors import AnalysisError
from tell_core.training.collation import FloatArray

if TYPE_CHECKING:
    from tell_core.analysis.quanta.gradients import Float32Array

LoadWeights = Callable[[int], nn.Module]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Movement:
    """How a training moved, as seen from its units.

    Attributes:
        steps: Shape (K + 1,). Optimiser steps done at each probe, rising.
        along: Shape (K, U). Inner product of a unit's negative gradient with the movement of the
            interval, whose length is set to 1: what its loss falls by per unit of length, in nats.
        gram: Shape (K, U, U). Inner products of the units' gradients at the interval's start.
        losses: Shape (K, U). Loss of each unit there, in nats.
    """

    steps: IntArray
    along: FloatArray
    gram: FloatArray
    losses: FloatArray

    @classmethod
    def load(cls, path: Path) -> Movement:
        """Read what `save` wrote.

        Raises:
            AnalysisError: The file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                parts = {name: arrays[name] for name in ("steps", "along", "gram", "losses")}
        except (OSError, ValueError, KeyError) as error:
            raise AnalysisError(
                f"cannot read {path}: {error}. Remove it and measure anew"
            ) from error
        steps = parts.pop("steps")
        return cls(steps, **{name: part.astype(np.float64) for name, part in parts.items()})

    def save(self, path: Path) -> None:
        """Write the arrays; the inner products in single precision, as they were computed."""
        np.savez(
            path,
            steps=self.steps,
            along=self.along.astype(np.float32),
            gram=self.gram.astype(np.float32),
            losses=self.losses.astype(np.float32),
        )


def measure_movement(
    load: LoadWeights,
    steps: Sequence[int],
    samples: EncodedExamples,
    projection: Projection,
    *,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
) -> Movement:
    """Gradients of the units at every probe but the last, and the movements between probes.

    A unit's loss is the mean over its supervised tokens. Costs K backwards per unit.

    Args:
        load: The model in float32 as it was after so many steps, adapters merged; a new one on
            every call.
        steps: K + 1 numbers of steps, rising, K at least 1.
        samples: U units: examples whose supervised tokens are the unit's.
        projection: One map for gradients and movements.
        device: Where the models are; the CPU by default.
        on_progress: Called with intervals done and K.
    """
    device = device or torch.device("cpu")
    counts = samples.supervised_counts
    along, gram, losses = [], [], []
    model = load(steps[0])
    for done, step in enumerate(steps[1:], start=1):
        found = project_gradients(model, samples, projection, device=device)
        before, model = model, load(step)
        vectors = found.vectors / counts[:, None].astype(np.float32)
        along.append(-(vectors @ _direction(projected_change(before, model, projection))))
        gram.append(vectors @ vectors.T)
        losses.append(found.losses / counts)
        if on_progress:
            on_progress(done, len(steps) - 1)
    return Movement(
        np.asarray(steps, dtype=np.int64),
        np.asarray(along, dtype=np.float64),
        np.asarray(gram, dtype=np.float64),
        np.asarray(losses, dtype=np.float64),
    )


def projected_change(before: nn.Module, after: nn.Module, projection: Projection) -> Float32Array:
    """The difference of two models' linear layers, projected as their gradients are: shape (D,)."""
    layers, later = linear_layers(before), linear_layers(after)
    device = next(before.parameters()).device
    sums_BD = torch.zeros(1, projection.num_dimensions, device=device)
    with torch.no_grad():
        for name, layer in layers.items():
            change_OI = later[name].weight - layer.weight
            # A projection takes sums over positions of output times input: rows, one by one.
            rows_BOO = torch.eye(len(change_OI), device=device)[None]
            projection.add(name, rows_BOO, change_OI[None], sums_BD)
    found: Float32Array = sums_BD[0].cpu().numpy()
    return found


def _direction(change: Float32Array) -> Float32Array:
    """``change`` at length 1; zero where nothing moved."""
    length = float(np.linalg.norm(change))
    return change / np.float32(length) if length > 0 else change
