"""Loss of the supervised tokens, without computing logits that no loss reads.

With a vocabulary of 49 152 tokens the output layer of a 135 M-parameter model costs as much as a
third of the rest; prompts are most of the tokens and none of their logits matter. Of those that
do matter only a chunk stands in memory at once.

Shape letters: R rows, L longest row, S supervised tokens, C tokens of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tell_core.training.collation import MicroBatch

logger = logging.getLogger(__name__)

# Most bytes of float32 logits at once. On a CPU no larger than its caches can hold in part; a GPU
# needs more rows to be busy.
LOGIT_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}

Head = Callable[[torch.Tensor], torch.Tensor]

# Whether `_head` gives the logits that the model itself gives, by output layer.
_is_head_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def supervised_nll(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Negative log-likelihood of each supervised token, in nats, float32.

    When the logits would exceed `LOGIT_BYTES` they are computed in chunks and never kept.

    Returns:
        Shape (S,), in the order of ``batch.targets_S``.
    """
    chunk = _chunk_tokens(model, batch)
    if chunk is not None and chunk < len(batch.targets_S):
        hidden_SD = _hidden_at_supervised(model, batch)
        if hidden_SD is not None:
            is_trained = any(weight.requires_grad for weight in _output_layer(model).parameters())
            return chunked_nll(
                _head(model), hidden_SD, batch.targets_S, chunk, is_trained=is_trained
            )
    logits_SV = supervised_logits(
        model, batch.input_ids_RL, batch.positions_S, **_packed_arguments(batch)
    )
    return _nll(logits_SV, batch.targets_S)


def reference_nll(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """What `supervised_nll` must equal, by the model's full logits of one forward pass; (S,)."""
    logits = model(input_ids=batch.input_ids_RL, use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.positions_S)
    return _nll(flat, batch.targets_S)


def supervised_logits(
    model: nn.Module, input_ids_RL: torch.Tensor, positions_S: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """Logits at the given flat positions only, whatever the model does after its output layer.

    The input of the output layer is narrowed to ``positions_S``; scaling or capping of logits
    that follow see the same rows as they would otherwise. A model whose output layer is not
    called as a module on (R, L, D) computes all logits, and these are narrowed.

    Returns:
        Shape (S, V).
    """
    captured: list[torch.Tensor] = []
    with _narrowed_output_layer(model, input_ids_RL, positions_S, captured):
        logits: torch.Tensor = model(input_ids=input_ids_RL, use_cache=False, **arguments).logits
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if captured else flat.index_select(0, positions_S)


def chunked_nll(
    head: Head,
    hidden_SD: torch.Tensor,
    targets_S: torch.Tensor,
    chunk: int,
    *,
    is_trained: bool,
) -> torch.Tensor:
    """Negative log-likelihoods whose logits are computed ``chunk`` tokens at a time.

    Under an output layer that is not trained, the gradient by the hidden states is computed
    along with the loss and kept in place of the logits; under one that is, each chunk is computed
    again when it is differentiated.

    Args:
        head: Hidden states (C, D) to logits (C, V).
        hidden_SD: Input of the output layer at the positions that predict supervised tokens.
        targets_S: The supervised tokens.
        chunk: Tokens at once, at least 1.
        is_trained: Whether weights of ``head`` get gradients.

    Returns:
        Shape (S,), in nats, float32.
    """
    parts = zip(torch.split(hidden_SD, chunk), torch.split(targets_S, chunk), strict=True)
    if not torch.is_grad_enabled() or not (is_trained or hidden_SD.requires_grad):
        return torch.cat([_head_nll(head, *part) for part in parts])
    if is_trained:
        return torch.cat(
            [checkpoint(_head_nll, head, *part, use_reentrant=False) for part in parts]
        )
    nll_S, gradient_SD = _with_gradient(head, hidden_SD.detach(), targets_S, chunk)
    return cast(torch.Tensor, _KnownGradient.apply(hidden_SD, nll_S, gradient_SD))  # type: ignore[no-untyped-call]


def _with_gradient(
    head: Head, hidden_SD: torch.Tensor, targets_S: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (S,) and its gradient by the hidden states (S, D) in one pass over the chunks.

    The loss of a token depends on its own hidden state only, so the gradient of their sum holds,
    row by row, the gradient of each.
    """
    losses: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for hidden_CD, targets_C in zip(
        torch.split(hidden_SD, chunk), torch.split(targets_S, chunk), strict=True
    ):
        hidden_CD = hidden_CD.detach().requires_grad_()
        nll_C = _head_nll(head, hidden_CD, targets_C)
        gradients += torch.autograd.grad(nll_C.sum(), hidden_CD)
        losses.append(nll_C.detach())
    return torch.cat(losses), torch.cat(gradients)


class _KnownGradient(torch.autograd.Function):
    """Losses whose gradient by the hidden states is there already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,  # noqa: ARG004 — what the gradient is by
        nll_S: torch.Tensor,
        gradient_SD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient_SD)
        return nll_S.clone()

    @staticmethod
    def backward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_SD,) = ctx.saved_tensors
        return gradient_SD * weights[0].to(gradient_SD.dtype)[:, None], None, None


def _head_nll(head: Head, hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return _nll(head(hidden_CD), targets_C)


def _nll(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="none")


def _chunk_tokens(model: nn.Module, batch: MicroBatch) -> int | None:
    """Tokens of which the logits fit `LOGIT_BYTES`; None when the output layer is unknown."""
    output_layer = _output_layer(model)
    if output_layer is None or not _is_head_known.get(output_layer, True):
        return None
    vocabulary = int(getattr(output_layer, "out_features", 0))
    if not vocabulary:
        return None
    limit = LOGIT_BYTES.get(batch.targets_S.device.type, LOGIT_BYTES["cpu"])
    return max(1, limit // (4 * vocabulary))


def _output_layer(model: nn.Module) -> Any:
    """The module that makes logits; None when the model has none."""
    return model.get_output_embeddings()  # type: ignore[operator]


def _head(model: nn.Module) -> Head:
    """Hidden states to logits: the output layer and the scaling or capping that follows it.

    The three ways of transformers' families: Cohere multiplies, Granite divides, Gemma caps.
    """
    output_layer = _output_layer(model)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    factor = getattr(config, "logit_scale", None) or 1.0
    factor /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden_CD: torch.Tensor) -> torch.Tensor:
        logits_CV: torch.Tensor = output_layer(hidden_CD)
        if factor != 1.0:
            logits_CV = logits_CV * factor
        return torch.tanh(logits_CV / cap) * cap if cap else logits_CV

    return head


def _hidden_at_supervised(model: nn.Module, batch: MicroBatch) -> torch.Tensor | None:
    """Input of the output layer at the supervised positions, shape (S, D).

    The first time, the model itself computes the logits of one position, which show whether
    `_head` does as the model does; None when not, or when the layer's input cannot be had.
    """
    output_layer = _output_layer(model)
    is_new = output_layer not in _is_head_known
    captured: list[torch.Tensor] = []
    with _narrowed_output_layer(
        model, batch.input_ids_RL, batch.positions_S, captured, shown_rows=int(is_new)
    ):
        own = model(
            input_ids=batch.input_ids_RL, use_cache=False, **_packed_arguments(batch)
        ).logits
    if is_new:
        is_known = bool(captured) and _is_close(_head(model), captured[0], own)
        _is_head_known[output_layer] = is_known
        if not is_known:
            logger.warning(
                "the output layer of %s does more than is known here: its logits are computed at"
                " once, not in chunks",
                type(model).__name__,
            )
    return captured[0] if _is_head_known[output_layer] else None


def _is_close(head: Head, hidden_SD: torch.Tensor, own: torch.Tensor) -> bool:
    with torch.no_grad():
        ours = head(hidden_SD[:1]).float().flatten()
    tolerance = 1e-4 if own.dtype == torch.float32 else 2e-2
    return torch.allclose(ours, own.float().flatten(), rtol=tolerance, atol=tolerance)


def _packed_arguments(batch: MicroBatch) -> dict[str, Any]:
    """What the model is told of packed examples; nothing of padded ones."""
    if batch.segment_lengths is None:
        return {}
    return {
        "position_ids": batch.position_ids_RL,
        "segment_lengths": batch.segment_lengths,
    }


@contextmanager
def _narrowed_output_layer(
    model: nn.Module,
    input_ids_RL: torch.Tensor,
    positions_S: torch.Tensor,
    captured: list[torch.Tensor],
    shown_rows: int | None = None,
) -> Iterator[None]:
    """Let the output layer see only ``positions_S``, or the first few of them.

    Its narrowed input (S, D) is added to ``captured``, which stays empty when the layer is not
    called as a module on (R, L, D).
    """

    def narrow(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        hidden_RLD = inputs[0]
        if hidden_RLD.shape[:-1] != input_ids_RL.shape:
            return None
        flat = hidden_RLD.reshape(-1, hidden_RLD.shape[-1])
        captured.append(flat.index_select(0, positions_S))
        return (captured[0][:shown_rows].unsqueeze(0),)

    output_layer = _output_layer(model)
    if output_layer is None:
        yield
        return
    hook = output_layer.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
