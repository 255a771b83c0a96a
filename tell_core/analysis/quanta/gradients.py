"""Per-sample gradients of a language model: one batched backward, a projection on the way.

Hooks on the linear layers see, for every sample of a batch, the layer's input and the gradient by
its output; their product is that sample's gradient by the weight. It is projected at once and
forgotten. No weight requires a gradient, so the backward costs what its activations cost, and
every sample goes backward exactly once.

Shape letters: S samples (examples), B samples of a batch, D projected dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.analysis.quanta.projection import Projection
from tell_core.data.encoding import EncodedExamples
from tell_core.errors import ModelError
from tell_core.training.batching import Limits, lay_out
from tell_core.training.collation import MicroBatch, collate
from tell_core.training.losses import supervised_nll

LIMITS = Limits("length_grouped", max_examples=32, max_tokens=1024)
"""Samples and padded tokens that go backward together: 30 layers of SmolLM2-135M keep about 2.5 MB
per token until the backward."""
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProjectedGradients:
    """Projected gradients of S samples.

    Attributes:
        vectors: Shape (S, D), float32. In the order of the examples.
        losses: Shape (S,), float64. Summed negative log-likelihood of each, in nats.
        num_backwards: Samples that went backward; S, or the method is not what it says.
    """

    vectors: Float32Array
    losses: npt.NDArray[np.float64]
    num_backwards: int


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose weights are looked at: all linear ones but the output layer, by name.

    Embeddings, normalisations and biases are left out, as in the quantization paper's own
    analysis; the output layer mirrors the output token rather than a skill, and shares its weight
    with the embeddings in many models.

    Raises:
        ModelError: There is none.
    """
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    }
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer (torch.nn.Linear) beside its output"
            " layer; per-sample gradients are taken there"
        )
    return layers


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer -> (outputs, inputs), for `projection.Exact`."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in linear_layers(model).items()
    }


def project_gradients(
    model: nn.Module,
    examples: EncodedExamples,
    projection: Projection,
    *,
    device: torch.device | None = None,
    limits: Limits = LIMITS,
    on_progress: Callable[[int, int], None] | None = None,
) -> ProjectedGradients:
    """Project the gradient of each example's summed loss over its supervised tokens.

    For a single token give the example cut behind it, with that token alone supervised (see
    `tokens.token_samples`). The gradient is by the weights of `linear_layers`; of a model with
    adapters, merge them first (`loading.load_subject`), for at the start of a training half of
    LoRA's own gradients vanish. Memory: S x D numbers, and one layer's gradients of a batch.

    Args:
        model: Causal language model in float32 on ``device``; left as it was, without gradients.
        examples: S examples, each with a supervised token after at least one other.
        projection: What is kept of a gradient.
        device: Where the model is; the CPU by default.
        limits: Size of a batch; samples of similar length go together.
        on_progress: Called after each batch with samples done and S.
    """
    device = device or torch.device("cpu")
    vectors = np.zeros((len(examples), projection.num_dimensions), dtype=np.float32)
    losses = np.zeros(len(examples), dtype=np.float64)
    num_done = 0
    with _frozen(model), _projecting(model, projection) as backward:
        for rows in lay_out(examples.lengths, limits):
            batch = collate(examples, rows, device)
            vectors[rows], losses[rows] = backward(batch)
            num_done += len(rows)
            if on_progress:
                on_progress(num_done, len(examples))
    return ProjectedGradients(vectors, losses, num_done)


Backward = Callable[[MicroBatch], tuple[Float32Array, npt.NDArray[np.float64]]]


@contextmanager
def _projecting(model: nn.Module, projection: Projection) -> Iterator[Backward]:
    """A function from a batch to its projected gradients (B, D) and losses (B,)."""
    sums_BD = torch.empty(0)

    def watch(name: str) -> Callable[..., None]:
        def project(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:  # a look at the model that is not differentiated
                return
            input_BTI = inputs[0].detach()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda delta_BTO: projection.add(name, delta_BTO, input_BTI, sums_BD)
            )

        return project

    def backward(batch: MicroBatch) -> tuple[Float32Array, npt.NDArray[np.float64]]:
        nonlocal sums_BD
        num_samples = len(batch.rows)
        device = batch.input_ids_RL.device
        sums_BD = torch.zeros(num_samples, projection.num_dimensions, device=device)
        nll_S = supervised_nll(model, batch)
        nll_S.sum().backward()  # type: ignore[no-untyped-call]
        losses = batch.sum_by_row(nll_S.detach().double().cpu().numpy())
        return sums_BD.cpu().numpy(), losses

    with ExitStack() as hooks:
        for name, layer in linear_layers(model).items():
            hooks.callback(layer.register_forward_hook(watch(name)).remove)
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        hooks.callback(embedding.register_forward_hook(_require_gradient).remove)
        yield backward


def _require_gradient(_: nn.Module, __: object, output: torch.Tensor) -> None:
    """Start the graph at the embeddings: nothing before them is differentiated."""
    output.requires_grad_(True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight that requires a gradient, then as before."""
    was_training = model.training
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        model.train(was_training)


def looped_gradients(model: nn.Module, examples: EncodedExamples) -> Float32Array:
    """The same gradients by the plain way: one sample at a time, by autograd's own weights.

    What `project_gradients` is checked against; S times slower to read and to run.

    Returns:
        Shape (S, number of weights in `linear_layers`), laid out as by `projection.Exact`.
    """
    weights = [layer.weight for layer in linear_layers(model).values()]
    required = [weight.requires_grad for weight in weights]
    rows = []
    for weight in weights:
        weight.requires_grad_(True)
    for row in range(len(examples)):
        nll_S = supervised_nll(model, collate(examples, [row], weights[0].device))
        gradients = torch.autograd.grad(nll_S.sum(), weights)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).cpu().numpy())
    for weight, was_required in zip(weights, required, strict=True):
        weight.requires_grad_(was_required)
    return np.stack(rows).astype(np.float32, copy=False)


def relative_errors(measured: Float32Array, expected: Float32Array) -> npt.NDArray[np.float64]:
    """Norm of each row's difference over the norm of the expected row, shape (S,)."""
    difference = np.linalg.norm(measured.astype(np.float64) - expected, axis=1)
    return np.asarray(difference / np.linalg.norm(expected.astype(np.float64), axis=1))
