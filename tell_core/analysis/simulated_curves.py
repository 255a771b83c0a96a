"""Simulated loss curves of single items whose shape is known, for the controls of emergence.

Falls are 1 to 3 nats. Steps: middle at 25 to 75 % of the range of log(step + 1), 90-10 % fall
within 5 to 35 % of it. Power laws: exponent 0.2 to 1, log-uniform. Lines: in log(step + 1).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

from tell_core.analysis.resampling import FloatArray

Kind = Literal["flat", "line", "power", "step", "rise", "turn"]
RIGHT: Mapping[Kind, str] = MappingProxyType(
    {
        "flat": "flat",
        "line": "gradual",
        "power": "gradual",
        "step": "step",
        "rise": "rising",
        "turn": "undetermined",
    }
)
"""The verdict that is right for each kind of curve."""


def spaced_steps(num_points: int, last: int = 400) -> FloatArray:
    """Step 0 and whole numbers in geometric progression up to ``last``, shape (P,)."""
    spaced = np.unique(np.round(np.geomspace(1, last, 4 * num_points)))
    places = np.round(np.linspace(0, len(spaced) - 1, num_points - 1)).astype(int)
    return np.concatenate([[0.0], spaced[places]])


def simulated_curves(
    kind: Kind, steps: FloatArray, num_items: int, noise: float, seed: int
) -> FloatArray:
    """Losses of N items of one kind at the steps (P,), shape (P, N), in nats.

    Args:
        kind: The shape.
        steps: Optimiser steps, rising from 0.
        num_items: N.
        noise: Standard deviation of each loss.
        seed: Seed of shapes and noise.
    """
    generator = np.random.default_rng(seed)
    time = np.log1p(steps) / np.log1p(steps[-1])
    fall = generator.uniform(1, 3, (num_items, 1))
    clean = 0.3 + fall * _shape(kind, time, np.log1p(steps[-1]), num_items, generator)
    return np.asarray((clean + generator.normal(0, noise, clean.shape)).T)


def _shape(
    kind: Kind, time: FloatArray, reach: float, num_items: int, generator: np.random.Generator
) -> FloatArray:
    column = (num_items, 1)
    if kind == "flat":
        return np.ones((num_items, len(time)))
    if kind == "line":
        return np.tile(1 - time, column)
    if kind == "rise":
        return np.tile(time, column)
    if kind == "turn":
        return np.tile(4 * (time - 0.5) ** 2, column)
    if kind == "power":
        exponent = np.exp(generator.uniform(np.log(0.2), 0, column))
        return np.asarray(np.exp(-exponent * reach * time))
    middle, width = generator.uniform(0.25, 0.75, column), generator.uniform(0.05, 0.35, column)
    return np.asarray(1 / (1 + np.exp(2 * np.log(9) * (time - middle) / width)))
