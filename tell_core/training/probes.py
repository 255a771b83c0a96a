"""Probes: the loss of fixed examples at logarithmically spaced steps of a training.

Shape letters: N probe examples, P probe steps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples
from tell_core.training.collation import FloatArray, MicroBatch, collate
from tell_core.training.losses import supervised_nll

PROBE_BATCH_TOKENS = 8192


def probe_steps(num_steps: int, num_probes: int) -> tuple[int, ...]:
    """Steps after which the probe set is measured: 0 (untrained) to ``num_steps``, rising.

    Logarithmically spaced, then moved apart where rounding would make them coincide, so that there
    are exactly ``num_probes`` of them unless the training has fewer steps.

    Args:
        num_steps: Optimiser steps of the training, at least 1.
        num_probes: Wished number of probes, at least 2.
    """
    count = min(num_probes, num_steps + 1)
    steps = [0]
    for index, ideal in enumerate(np.geomspace(1, num_steps, count - 1), start=1):
        latest = num_steps - (count - 1 - index)
        steps.append(min(max(round(ideal), steps[-1] + 1), latest))
    steps[-1] = num_steps
    return tuple(steps)


@dataclass(frozen=True)
class ProbeSet:
    """Probe examples, collated once.

    Attributes:
        batches: Micro-batches of similar length.
        num_examples: N.
        is_task: Shape (N,). Whether an example belongs to the task.
    """

    batches: tuple[MicroBatch, ...]
    num_examples: int
    is_task: npt.NDArray[np.bool_]

    @classmethod
    def prepare(cls, examples: EncodedExamples, device: torch.device) -> ProbeSet:
        """Group ``examples`` by length into batches of at most `PROBE_BATCH_TOKENS` tokens."""
        batches: list[MicroBatch] = []
        rows: list[int] = []
        for row in np.argsort(-examples.lengths, kind="stable").tolist():
            if rows and (len(rows) + 1) * examples.lengths[rows[0]] > PROBE_BATCH_TOKENS:
                batches.append(collate(examples, rows, device))
                rows = []
            rows.append(row)
        if rows:
            batches.append(collate(examples, rows, device))
        return cls(tuple(batches), len(examples), examples.is_task)

    def measure(self, model: nn.Module, autocast: AbstractContextManager[object]) -> FloatArray:
        """Mean negative log-likelihood per supervised token of each example, in nats, shape (N,).

        Dropout is off while measuring.
        """
        was_training = model.training
        model.eval()
        losses = np.empty(self.num_examples, dtype=np.float64)
        with torch.no_grad(), autocast:
            for batch in self.batches:
                losses[batch.rows] = _mean_nll(model, batch)
        model.train(was_training)
        return losses

    def task_loss(self, losses: FloatArray) -> float | None:
        """Mean of the task examples' losses, or None when there are no task examples."""
        return float(losses[self.is_task].mean()) if self.is_task.any() else None


def _mean_nll(model: nn.Module, batch: MicroBatch) -> FloatArray:
    nll_S = supervised_nll(model, batch).double().cpu().numpy()
    return batch.sum_by_row(nll_S) / batch.sum_by_row(np.ones_like(nll_S))


def save_probe(path: Path, steps: tuple[int, ...], losses: FloatArray) -> None:
    """Write ``steps`` (P,) and ``losses`` (P, N)."""
    np.savez(path, steps=np.asarray(steps, dtype=np.int64), losses=losses)


def load_probe(path: Path) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Read the steps (P,) and losses (P, N) that `save_probe` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["steps"], arrays["losses"]
