"""Loss of the supervised tokens, without computing logits that no loss reads.

With a vocabulary of 49 152 tokens the output layer of a 135 M-parameter model costs as much as a
third of the rest; prompts are most of the tokens and none of their logits matter.

Shape letters: R rows, L longest row, S supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from tell_core.training.collation import MicroBatch


def supervised_nll(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Negative log-likelihood of each supervised token, in nats, float32.

    Returns:
        Shape (S,), in the order of ``batch.targets_S``.
    """
    logits_SV = supervised_logits(model, batch.input_ids_RL, batch.positions_S)
    return F.cross_entropy(logits_SV.float(), batch.targets_S, reduction="none")


def supervised_logits(
    model: nn.Module, input_ids_RL: torch.Tensor, positions_S: torch.Tensor
) -> torch.Tensor:
    """Logits at the given flat positions only, whatever the model does after its output layer.

    The input of the output layer is narrowed to ``positions_S``; scaling or capping of logits
    that follow see the same rows as they would otherwise. A model whose output layer is not
    called as a module on (R, L, D) computes all logits, and these are narrowed.

    Returns:
        Shape (S, V).
    """
    with _narrowed_output_layer(model, input_ids_RL, positions_S) as was_narrowed:
        logits: torch.Tensor = model(input_ids=input_ids_RL, use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if was_narrowed else flat.index_select(0, positions_S)


@contextmanager
def _narrowed_output_layer(
    model: nn.Module, input_ids_RL: torch.Tensor, positions_S: torch.Tensor
) -> Iterator[list[bool]]:
    """Let the output layer see only ``positions_S``; the yielded list is filled when it did."""
    was_narrowed: list[bool] = []

    def narrow(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        hidden_RLD = inputs[0]
        if hidden_RLD.shape[:-1] != input_ids_RL.shape:
            return None
        was_narrowed.append(True)
        hidden_SD = hidden_RLD.reshape(-1, hidden_RLD.shape[-1]).index_select(0, positions_S)
        return (hidden_SD.unsqueeze(0),)

    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    if output_layer is None:
        yield was_narrowed
        return
    hook = output_layer.register_forward_pre_hook(narrow)
    try:
        yield was_narrowed
    finally:
        hook.remove()
