"""Log-likelihood of gold responses, teacher-forced.

Shape letter: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples
from tell_core.training.collation import collate
from tell_core.training.losses import supervised_nll

# A batch is closed before it exceeds either; the second bounds the memory of the logits.
BATCH_TOKENS = 8192
BATCH_SUPERVISED_TOKENS = 2048


def gold_nll(
    model: nn.Module,
    examples: EncodedExamples,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each example's supervised tokens, summed, in nats.

    The end-of-turn token is among them. Per token: divide by ``examples.supervised_counts``.
    Batches are formed by length; they change the result only by rounding.

    Args:
        model: Causal language model on ``device``, in evaluation mode.
        examples: N examples, each with at least one supervised token after at least one other.
        device: Where the model is.
        on_progress: Called after each batch with examples done and N.

    Returns:
        Shape (N,), each >= 0.
    """
    totals = np.zeros(len(examples), dtype=np.float64)
    num_done = 0
    for rows in _batches(examples):
        batch = collate(examples, rows, device)
        with torch.inference_mode():
            nll = supervised_nll(model, batch).double().cpu().numpy()
        of_rows = np.bincount(batch.batch_rows_S.cpu().numpy(), nll, minlength=len(rows))
        totals[batch.rows] = of_rows
        num_done += len(rows)
        if on_progress:
            on_progress(num_done, len(examples))
    return totals


def _batches(examples: EncodedExamples) -> Iterator[list[int]]:
    """Rows of similar length, longest first; a batch has one row at least."""
    rows: list[int] = []
    supervised = 0
    for row in np.argsort(-examples.lengths, kind="stable").tolist():
        supervised += int(examples.supervised_counts[row])
        padded = (len(rows) + 1) * int(examples.lengths[rows[0] if rows else row])
        if rows and (padded > BATCH_TOKENS or supervised > BATCH_SUPERVISED_TOKENS):
            yield rows
            rows, supervised = [], int(examples.supervised_counts[row])
        rows.append(row)
    if rows:
        yield rows
