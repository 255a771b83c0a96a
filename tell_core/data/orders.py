"""Orders: in which order a training meets its examples, and the proof that it is shuffled.

Shape letters: N examples of the mixture, M positions of a whole training.
"""

import hashlib
import math
from typing import Any

import numpy as np
from scipy.special import gammaln

from tell_core.data.encoding import BoolArray, IntArray
from tell_core.data.seeding import seeded_generator
from tell_core.spec.arms import OrderKind

_NUM_WINDOWS = 50


def build_order(
    kind: OrderKind,
    num_task: int,
    num_general: int,
    num_epochs: int,
    seed: int,
    num_blocks: int | None = None,
) -> IntArray:
    """Order of all epochs in sequence; every example once per epoch, each epoch drawn anew.

    Examples 0 to ``num_task - 1`` are task data, the rest general data.

    Args:
        kind: shuffle: one uniform permutation of everything (the extensive shuffle);
            task_first, task_last: task and general data shuffled apart, one after the other;
            blocks: both shuffled apart and cut into ``num_blocks`` parts, general part 1,
            task part 1, general part 2, ...
        num_task: Task examples.
        num_general: General examples.
        num_epochs: Passes over the mixture.
        seed: Seed of the permutations; an epoch's order does not depend on how many follow.
        num_blocks: Blocks per epoch, for kind blocks.

    Returns:
        Shape (M,), M = num_epochs * (num_task + num_general), int32.
    """
    epochs = [
        _epoch_order(kind, num_task, num_general, num_blocks or 1, _epoch_generator(seed, epoch))
        for epoch in range(num_epochs)
    ]
    return np.concatenate(epochs).astype(np.int32)


def num_passes(num_examples: int, epochs: int, batch_size: int, min_steps: int) -> int:
    """Passes over a mixture: ``epochs``, or as many as ``min_steps`` optimiser steps need.

    Args:
        num_examples: Examples of the mixture, at least 1.
        epochs: Fewest passes.
        batch_size: Examples per optimiser step.
        min_steps: Fewest optimiser steps.
    """
    return max(epochs, math.ceil(min_steps * batch_size / num_examples))


def repeated_order(num_task: int, num_positions: int, seed: int) -> IntArray:
    """Shuffled epochs of task data alone, repeated and cut off after ``num_positions``.

    Returns:
        Shape (num_positions,), int32.
    """
    num_epochs = math.ceil(num_positions / num_task)
    return build_order("shuffle", num_task, 0, num_epochs, seed)[:num_positions]


def repeated_visits(num_task: int, num_positions: int, seed: int) -> IntArray:
    """How often `repeated_order` meets each example, without laying it out.

    Returns:
        Shape (num_task,).
    """
    num_epochs, rest = divmod(num_positions, num_task)
    visits = np.full(num_task, num_epochs)
    visits[_epoch_order("shuffle", num_task, 0, 1, _epoch_generator(seed, num_epochs))[:rest]] += 1
    return visits


def shuffle_proof(order_first_epoch: IntArray, is_task: BoolArray) -> dict[str, Any]:
    """How evenly task examples lie among general ones in one epoch.

    A gap is a run of general examples before, between or after task examples. The runs test is
    Wald and Wolfowitz's with its exact distribution: task examples are few, and the normal
    approximation then calls every tenth fair shuffle suspicious.

    Args:
        order_first_epoch: Shape (N,). Example at each position of the first epoch.
        is_task: Shape (N,). Whether an example is task data, by example.

    Returns:
        largest_gap and mean_gap in examples; window (examples per window) and
        task_share_per_window; runs, expected_runs and the two-sided runs_p_value, None where all
        examples are of one kind; order_digest (sha256 of the order).
    """
    marks = np.asarray(is_task)[order_first_epoch]
    gaps = np.diff(np.concatenate([[-1], np.flatnonzero(marks), [len(marks)]])) - 1
    window = max(1, math.ceil(len(marks) / _NUM_WINDOWS))
    return {
        "largest_gap": int(gaps.max()),
        "mean_gap": float(gaps.mean()),
        "window": window,
        "task_share_per_window": [
            float(marks[start : start + window].mean()) for start in range(0, len(marks), window)
        ],
        **_runs_test(marks),
        "order_digest": order_digest(order_first_epoch),
    }


def order_digest(order: IntArray) -> str:
    """sha256 of an order, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(order, dtype="<i4").tobytes()).hexdigest()


def _epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    return seeded_generator(seed, "order", epoch)


def _epoch_order(
    kind: OrderKind, num_task: int, num_general: int, num_blocks: int, rng: np.random.Generator
) -> IntArray:
    if kind == "shuffle":
        return rng.permutation(num_task + num_general)
    task = rng.permutation(num_task)
    general = num_task + rng.permutation(num_general)
    if kind == "task_first":
        return np.concatenate([task, general])
    parts = 1 if kind == "task_last" else num_blocks
    pairs = zip(np.array_split(general, parts), np.array_split(task, parts), strict=True)
    return np.concatenate([part for pair in pairs for part in pair])


def _runs_test(marks: BoolArray) -> dict[str, Any]:
    """Runs, their expectation and p-value for a sequence of two kinds in random order."""
    num_task, num_all = int(marks.sum()), len(marks)
    num_general = num_all - num_task
    runs = 1 + int((marks[1:] != marks[:-1]).sum())
    if not num_task or not num_general:
        return {"runs": runs, "expected_runs": None, "runs_p_value": None}
    probabilities = _runs_distribution(num_task, num_general)
    at_most = float(probabilities[: runs + 1].sum())
    at_least = float(probabilities[runs:].sum())
    return {
        "runs": runs,
        "expected_runs": 1 + 2 * num_task * num_general / num_all,
        "runs_p_value": min(1.0, 2 * min(at_most, at_least)),
    }


def _runs_distribution(num_a: int, num_b: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Probability of each number of runs, from 0 to the largest possible one.

    2k runs: 2 C(a-1, k-1) C(b-1, k-1) / C(a+b, a); 2k+1 runs: the two ways of k and k+1 parts.
    """
    pairs = np.arange(1, min(num_a, num_b) + 1)
    log_all = _log_choose(num_a + num_b, num_a)
    a_here, b_here = _log_choose(num_a - 1, pairs - 1), _log_choose(num_b - 1, pairs - 1)
    a_next, b_next = _log_choose(num_a - 1, pairs), _log_choose(num_b - 1, pairs)
    probabilities = np.zeros(2 * len(pairs) + 2)
    probabilities[2::2] = 2 * np.exp(a_here + b_here - log_all)
    probabilities[3::2] = np.exp(a_next + b_here - log_all) + np.exp(a_here + b_next - log_all)
    return probabilities[: 2 * len(pairs) + 2]


def _log_choose(n: int, k: Any) -> Any:
    """log of the binomial coefficient; minus infinity where k > n."""
    with np.errstate(invalid="ignore"):
        value = gammaln(n + 1) - gammaln(np.asarray(k) + 1.0) - gammaln(n - np.asarray(k) + 1.0)
    return np.where(np.asarray(k) > n, -np.inf, value)
