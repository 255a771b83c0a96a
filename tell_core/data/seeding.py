"""Random generators and choices that depend on stable integers only, never on global state."""

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np

from tell_core.data.encoding import IntArray

_SEED_MASK = (1 << 64) - 1


def seeded_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator for one purpose: equal arguments give equal draws, on every machine.

    Args:
        seed: Any integer.
        purpose: Keeps the draws of different purposes apart, for the same seed.
        numbers: Further non-negative integers, such as an epoch.
    """
    entropy = [seed & _SEED_MASK, zlib.crc32(purpose.encode()), *numbers]
    return np.random.Generator(np.random.PCG64(entropy))


def choose_rows(example_ids: Sequence[str], limit: int | None, seed: int, purpose: str) -> IntArray:
    """Choose at most ``limit`` rows by md5 of their ids, in rising order of rows.

    A row's place in the choice depends on its own id alone (rows of equal ids by their order):
    the choice with a smaller limit is a subset of the one with a larger limit.
    """
    keys = [hashlib.md5(f"{seed}|{purpose}|{name}".encode()).digest() for name in example_ids]
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:limit]
    return np.asarray(sorted(chosen), dtype=np.int64)
