"""Vectors without clusters, against which whatever clustering finds has to stand out.

Shape letters: S samples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from tell_core.data.seeding import seeded_generator

NullKind = Literal["isotropic", "spectrum"]
NULL_KINDS: tuple[NullKind, ...] = ("isotropic", "spectrum")


def structureless(
    vectors_SD: npt.NDArray[np.floating], kind: NullKind, num_replicates: int, seed: int
) -> Iterator[npt.NDArray[np.float64]]:
    """Gaussian vectors, as many as there are samples.

    ``isotropic`` ones have no preferred direction. Those of kind ``spectrum`` have the second
    moments of the data's unit vectors, up to a rotation, which no cosine sees: a few strong
    directions alone make neighbours, without any cluster.

    Args:
        vectors_SD: Shape (S, D). The data.
        kind: Which vectors.
        num_replicates: How many sets of them.
        seed: Seed of the draws.

    Yields:
        Shape (S, D), or (S, min(S, D)) for ``spectrum``.
    """
    num_samples, num_dimensions = vectors_SD.shape
    scales: npt.NDArray[np.floating] = np.ones(num_dimensions)
    if kind == "spectrum":
        norms = np.linalg.norm(vectors_SD, axis=1, keepdims=True)
        unit = vectors_SD.astype(np.float64) / np.where(norms > 0, norms, 1)
        scales = np.linalg.svd(unit, compute_uv=False)
    for number in range(num_replicates):
        generator = seeded_generator(seed, f"quanta null {kind}", number)
        yield generator.standard_normal((num_samples, len(scales))) * scales
