"""Gradient of one optimiser step, over as many micro-batches as memory needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.training.batching import Limits, lay_out
from tell_core.training.collation import FloatArray, MicroBatch, collate, pack
from tell_core.training.devices import Precision
from tell_core.training.losses import supervised_nll


@dataclass
class StepLosses:
    """Sums over one step, in nats and tokens.

    Attributes:
        num_supervised: Supervised tokens.
        num_task: Supervised tokens of task data.
        total: Summed NLL of the supervised tokens.
        task: Summed NLL of those of task data.
        num_tokens: Tokens without padding.
        num_padded_tokens: Tokens with padding.
        num_forward_passes: Forward passes with gradient.
        by_row: Pairs of rows (R,) of the mixture's examples and their summed NLL (R,).
    """

    num_supervised: int
    num_task: int
    total: float = 0.0
    task: float = 0.0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_forward_passes: int = 0
    by_row: list[tuple[IntArray, FloatArray]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean NLL per supervised token."""
        return self.total / self.num_supervised

    @property
    def task_loss(self) -> float | None:
        """Mean NLL per supervised token of task data, or None without any."""
        return self.task / self.num_task if self.num_task else None

    @property
    def general_loss(self) -> float | None:
        """Mean NLL per supervised token of general data, or None without any."""
        num_general = self.num_supervised - self.num_task
        return (self.total - self.task) / num_general if num_general else None

    def rows_not_finite(self) -> list[int]:
        """Rows of the mixture's examples whose NLL is infinite or not a number."""
        return [int(row) for rows, sums in self.by_row for row in rows[~np.isfinite(sums)]]

    def worst_rows(self, examples: EncodedExamples) -> list[int]:
        """Rows of the mixture's examples, by falling mean NLL of their supervised tokens."""
        sums = {
            int(row): float(nll)
            for rows, of_rows in self.by_row
            for row, nll in zip(rows, of_rows, strict=True)
        }
        counts = examples.supervised_counts
        return sorted(sums, key=lambda row: -sums[row] / counts[row])


def step_gradients(
    model: nn.Module,
    examples: EncodedExamples,
    rows: IntArray,
    *,
    limits: Limits,
    device: torch.device,
    precision: Precision,
    share: IntArray | None = None,
) -> StepLosses:
    """Add the gradient of the mean NLL per supervised token of ``rows`` to the model's.

    The mean is over the tokens of the whole step, however they fall into micro-batches: a mean of
    their means would weigh the tokens of short answers more.

    Args:
        model: Packed layouts need it under `attention.segments_attended`.
        examples: The mixture's.
        rows: Shape (B,). The examples of the step.
        limits: How they are laid out in forward passes.
        device: Where the model is.
        precision: Number format of the forward pass.
        share: Indices into ``rows`` of those that are computed here, by default all. Gradients and
            sums of several shares of one step add up to those of the step.
    """
    counts = examples.supervised_counts[rows]
    losses = StepLosses(int(counts.sum()), int(counts[examples.is_task[rows]].sum()))
    mine = rows if share is None else rows[share]
    parts: list[tuple[MicroBatch, torch.Tensor]] = []
    gather = pack if limits.layout == "packed" else collate
    for part in lay_out(examples.lengths[mine], limits) if len(mine) else ():
        batch = gather(examples, mine[part], device)
        with precision.autocast(device):
            nll_S = supervised_nll(model, batch)
        (nll_S.sum() / losses.num_supervised).backward()  # type: ignore[no-untyped-call]
        parts.append((batch, nll_S.detach()))
    for batch, nll_S in parts:  # only now, so that a GPU is not waited for between micro-batches
        _add(losses, batch, nll_S, examples)
    return losses


def _add(
    losses: StepLosses, batch: MicroBatch, nll_S: torch.Tensor, examples: EncodedExamples
) -> None:
    """Add a micro-batch's sums, taken in float64."""
    by_row = batch.sum_by_row(nll_S.double().cpu().numpy())
    losses.total += float(by_row.sum())
    losses.task += float(by_row[examples.is_task[batch.rows]].sum())
    losses.num_tokens += batch.num_tokens
    losses.num_padded_tokens += batch.num_padded_tokens
    losses.num_forward_passes += 1
    losses.by_row.append((batch.rows, by_row))
