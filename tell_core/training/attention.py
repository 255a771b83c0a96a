"""Attention over packed examples, each seeing itself only.

Packed examples stand one after another in one sequence. A block-diagonal mask over all of it would
make attention pay for every pair of tokens; here each example's attention is computed by itself: by
the variable-length kernel of torch on a GPU in half precision, example by example with the scaled
dot product of torch elsewhere. The function is registered with transformers' attention interface,
so that a model family works when its attention goes through that interface.

Shape letters: B rows, H heads, L tokens, D width of a head.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray
from tell_core.errors import ModelError
from tell_core.training.batching import Limits
from tell_core.training.collation import collate, pack
from tell_core.training.devices import Precision, is_out_of_memory
from tell_core.training.identity import tokens_per_pass
from tell_core.training.losses import reference_nll, supervised_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell_core.spec.model import TrainingSpec

logger = logging.getLogger(__name__)

SEGMENT_ATTENTION = "tell_segments"
# Largest relative difference that rounding explains: sums of a few thousand products in float32
# differ by 1e-6 to 1e-5 between batch shapes; bfloat16 keeps 8 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
_COMPARED_EXAMPLES = 3
_HALF = (torch.bfloat16, torch.float16)


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of the sequence.

    Args:
        module: The attention layer.
        query: Shape (B, H, L, D).
        key: Shape (B, H or fewer, L, D).
        value: As ``key``.
        attention_mask: Always None: padding stands on the right, where nothing sees it.
        segment_lengths: Tokens of each packed example; None: the rows are not packed.
        sliding_window: How many tokens, itself included, a token sees; None: all before it.
        options: Scaling, dropout and what else the model hands to its attention.

    Returns:
        Shape (B, L, H, D), and no attention weights.
    """
    assert attention_mask is None, "packed examples carry no attention mask"
    lengths = list(segment_lengths or (query.shape[2],))
    if segment_lengths and query.is_cuda and not options.get("dropout"):
        dtype = _compute_dtype(query)
        if _has_kernel(dtype):
            states = (query.to(dtype), key.to(dtype), value.to(dtype))
            return _by_varlen_kernel(*states, lengths, sliding_window, options), None
    queries, keys, values = (torch.split(each, lengths, dim=2) for each in (query, key, value))
    outputs = [
        _causal(module, *segment, sliding_window, options)
        for segment in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _causal(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Causal attention of one segment, as transformers calls torch's; shape (B, L, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    num_tokens, mask = query.shape[2], None
    if sliding_window is not None and num_tokens > sliding_window:
        at = torch.arange(num_tokens, device=query.device)
        distance = at[:, None] - at[None, :]
        mask = ((distance >= 0) & (distance < sliding_window))[None, None]
    output: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return output


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Number format in which torch's own attention would compute: autocast has a say in it.

    Under it norms of queries and keys with float32 weights give float32, their values not.
    """
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@cache
def _kernel_arguments() -> frozenset[str]:
    """What the kernel of this torch can be told."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether the kernel computes in this format; that of torch 2.10 knows no scale nor windows."""
    return dtype in _HALF and {"scale", "window_size"} <= _kernel_arguments()


def _by_varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    sliding_window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """The same by one kernel for all segments of a row; shape (1, L, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=query.device)
    query_LHD, key_LHD, value_LHD = (part[0].transpose(0, 1) for part in (query, key, value))
    longest = max(lengths)
    # torch 2.11 takes groups of heads without being told.
    is_told = "enable_gqa" in _kernel_arguments()
    groups: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if is_told else {}
    output = varlen_attn(
        query_LHD, key_LHD, value_LHD, ends, ends, longest, longest,
        scale=options.get("scaling"),
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **groups,
    )  # fmt: skip
    return cast(torch.Tensor, output)[None]


def attention_name(
    model: nn.Module, limits: Limits, device: torch.device, precision: Precision
) -> str:
    """Which attention computes the examples of a training, for its summary."""
    own = str(cast("PreTrainedModel", model).config._attn_implementation)
    if limits.layout != "packed":
        return own
    is_kernel = device.type == "cuda" and _has_kernel(precision.compute or precision.weights)
    return "varlen, packed" if is_kernel else f"{own}, packed"


@contextmanager
def attended(model: PreTrainedModel, limits: Limits) -> Iterator[None]:
    """Let ``model`` keep packed examples apart where they are packed, then attend as before."""
    if limits.layout != "packed":
        yield
        return
    with segments_attended(model):
        yield


@contextmanager
def segments_attended(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend by `segment_attention`, then as before."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(SEGMENT_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def choose_limits(
    model: PreTrainedModel,
    examples: EncodedExamples,
    rows: IntArray,
    training: TrainingSpec,
    device: torch.device,
    precision: Precision,
) -> Limits:
    """How steps are laid out for this model; ``batching: auto`` packs where that is right.

    Args:
        model: In memory on ``device``.
        examples: The mixture's.
        rows: Shape (B,). Examples on which packing may be tried.
        training: Gives the wished layout and the sizes.
        device: Where the model is.
        precision: Number format.

    Raises:
        ModelError: ``batching: packed`` was asked for, and packed examples would not be trained as
            single ones are.
    """
    is_cpu = device.type == "cpu"
    return _limits(
        model, training, is_cpu, lambda: packing_refusal(model, examples, rows, device, precision)
    )


def planned_limits(model: PreTrainedModel, training: TrainingSpec) -> Limits:
    """What `choose_limits` will give if the numbers of packed examples are right, too.

    On a machine like this, with a GPU or without; for ``device: cuda`` on one with.

    Args:
        model: Its weights are not looked at; see `models.skeleton`.
        training: Gives the wished layout and the sizes.

    Raises:
        ModelError: As of `choose_limits`, for a reason that lies in the model's code.
    """
    has_gpu = training.device == "cuda" or torch.cuda.is_available()
    is_cpu = training.device == "cpu" or not has_gpu
    return _limits(model, training, is_cpu, lambda: structural_refusal(model))


def _limits(
    model: PreTrainedModel,
    training: TrainingSpec,
    is_cpu: bool,
    find_refusal: Callable[[], str | None],
) -> Limits:
    """The wished layout, or the nearest that this model can be trained in."""
    sizes = (training.micro_batch_size, tokens_per_pass(training, is_cpu=is_cpu))
    if training.batching == "padded" or training.batching == "length_grouped":
        return Limits(training.batching, *sizes)
    refusal = find_refusal()
    if refusal is None:
        return Limits("packed", *sizes)
    name = model.config.model_type
    if training.batching == "packed":
        raise ModelError(
            f"training.batching: packed was asked for, but examples cannot be packed for this"
            f" {name} model: {refusal}; use batching: length_grouped"
        )
    logger.info("examples are grouped by length, not packed, for this %s model: %s", name, refusal)
    return Limits("length_grouped", *sizes)


def packing_refusal(
    model: PreTrainedModel,
    examples: EncodedExamples,
    rows: IntArray,
    device: torch.device,
    precision: Precision,
) -> str | None:
    """Why examples cannot be packed for this model; None when packed equals one by one.

    What the model's code allows is looked at first, then its numbers: the losses of a few examples
    packed together against the same by the model's own attention, one example at a time.

    Args:
        model: In memory on ``device``.
        examples: Where examples are taken from.
        rows: Shape (B,), at least one. Those that may be used; the shortest are.
        device: Where the model is.
        precision: Number format; decides what counts as rounding.
    """
    refusal = structural_refusal(model)
    if refusal:
        return refusal
    rows = np.unique(rows)
    shortest = rows[np.argsort(examples.lengths[rows], kind="stable")][:_COMPARED_EXAMPLES]
    try:
        difference = _packed_apart(model, examples, shortest, device, precision)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return f"its packed forward pass fails ({type(error).__name__}: {error})"
    if not difference <= TOLERANCE[precision.name]:
        return (
            f"packed losses differ from those of single examples by {difference:.1e} of their"
            f" mean; rounding explains {TOLERANCE[precision.name]:.0e}"
        )
    return None


def structural_refusal(model: PreTrainedModel) -> str | None:
    """What in a model's code rules packing out, without computing anything."""
    attention = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    if attention != "sdpa":
        return f"its attention is {attention!r}, and examples are kept apart under 'sdpa' only"
    return None


def _packed_apart(
    model: PreTrainedModel,
    examples: EncodedExamples,
    rows: IntArray,
    device: torch.device,
    precision: Precision,
) -> float:
    """Largest difference of a token's loss packed and alone, over the mean loss."""
    was_training = model.training
    nn.Module.eval(model)
    try:
        with torch.no_grad(), precision.autocast(device):
            alone_S = torch.cat(
                [reference_nll(model, collate(examples, [row], device)) for row in rows]
            )
            with segments_attended(model):
                packed_S = supervised_nll(model, pack(examples, rows, device))
    finally:
        nn.Module.train(model, was_training)
    return float((packed_S - alone_S).abs().max() / alone_S.mean().clamp(min=1e-6))
