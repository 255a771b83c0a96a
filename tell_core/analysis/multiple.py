"""P-values from draws, and Holm's correction where many are compared."""

from collections.abc import Sequence

import numpy as np

from tell_core.analysis.resampling import FloatArray


def two_sided_p_value(lower: FloatArray, upper: FloatArray) -> float:
    """How seldom draws of a difference lie on the other side of 0, twice.

    It is at most 1 - confidence exactly where `interval` of the same draws leaves out 0, for every
    confidence whose interval leaves draws out at all. Draws cannot show a chance below one in
    their number, so it is never less than 1 / (D - 1).

    Args:
        lower: Shape (D,), D >= 2. Lower end of each draw; -inf where nothing is known.
        upper: Shape (D,). Upper end; inf where nothing is known.
    """
    num_opposite = min(int((lower <= 0).sum()), int((upper >= 0).sum()))
    return float(min(1.0, max(2 * num_opposite, 1) / (len(lower) - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values after Holm's step-down correction (1979): the chance of any false claim is bounded.

    Args:
        p_values: One per comparison; None where it is undefined, which does not count.

    Returns:
        Corrected values in the same order, at most 1, None where None was given.
    """
    known = [index for index, value in enumerate(p_values) if value is not None]
    values = np.asarray([p_values[index] for index in known], dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    corrected = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    found: list[float | None] = [None] * len(p_values)
    for place, value in zip(order, corrected, strict=True):
        found[known[place]] = float(value)
    return found
