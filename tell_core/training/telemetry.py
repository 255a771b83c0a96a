"""How much of a device's arithmetic a training uses.

Model FLOPs utilisation (MFU) by the usual convention: 6 operations per parameter and token (2
forward, 4 backward) for every matrix, and 6 for each of the two products of causal attention per
pair of tokens in which one sees the other; over the peak of the device in the number format of the
products. Two points differ from papers on pre-training, and both lower it: the output layer counts
for supervised tokens only, since no other logits are computed, and padding counts for nothing. With
adapters the gradients of frozen matrices are never computed, so that at most about 2/3 of what
is counted has to be done: MFU of adapters compares with other trainings of adapters.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import IntArray
from tell_core.training.devices import Precision
from tell_core.training.models import is_stack_of_experts

# Dense matrix products in bfloat16, without sparsity, as the makers' data sheets give them.
_PEAK_BFLOAT16 = {
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
_MATRIX_SIZE = 512
_REPEATS = 5


class ModelSizes(NamedTuple):
    """What the operations of a model are counted from; adapters are not.

    Attributes:
        body: Weights of matrices within layers, those of experts that see a token.
        head: Weights of the output layer.
        attended_width: Layers x heads x width of a head.
    """

    body: int
    head: int
    attended_width: int


def step_flops(sizes: ModelSizes, lengths: IntArray, num_supervised: int) -> float:
    """Operations of one step by the convention above.

    Args:
        sizes: Of the model.
        lengths: Shape (B,). Tokens of each example.
        num_supervised: Supervised tokens of all of them.
    """
    tokens = lengths.astype(np.float64)
    pairs = float((tokens * (tokens + 1) / 2).sum())
    products = sizes.body * float(tokens.sum()) + sizes.head * num_supervised
    return 6 * products + 12 * sizes.attended_width * pairs


def model_sizes(model: nn.Module) -> ModelSizes:
    """Sizes of a causal language model, with or without adapters.

    Of a mixture of experts as many as see a token are counted. Weights in 4 bits count as many as
    they stand for, not as many numbers as they are stored in.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    outside = {id(module) for table in tables if table for module in table.modules()}
    chosen = getattr(config, "num_experts_per_tok", None)
    body = sum(
        _matrix_weights(module, chosen)
        for name, module in model.named_modules()
        if "lora_" not in name and id(module) not in outside
    )
    head = _matrix_weights(tables[1], chosen) if tables[1] else 0
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelSizes(body, head, config.num_hidden_layers * width)


def _matrix_weights(module: nn.Module, chosen: int | None) -> int:
    """Weights of a module's own matrices by which each token is multiplied.

    Args:
        module: Its children are not looked at.
        chosen: Experts that see a token; None where all do.
    """
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.Embedding):  # a table is read, not multiplied by
        return 0
    total = 0
    for weight in module.parameters(recurse=False):
        if is_stack_of_experts(weight):
            used = min(chosen or len(weight), len(weight))
            total += used * weight[0].numel()
        elif weight.ndim >= 2:
            total += weight.numel()
    return total


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, precision: Precision, threads: int) -> float | None:
    """Peak operations per second of a device; None for a GPU that is not in the table.

    A CPU has no one number to look up: the best of a few products of 512 x 512 matrices is taken,
    with as many threads as training uses.

    Args:
        device: Where training runs.
        precision: Its number formats.
        threads: CPU threads of the training, which are set already.
    """
    dtype = precision.compute or precision.weights
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            return None
        return _peak_of_gpu(torch.cuda.get_device_name(device))
    del threads  # part of what the measurement is remembered by
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * _MATRIX_SIZE**3 / best


def _peak_of_gpu(name: str) -> float | None:
    """By the name that the driver gives; of a part of a GPU (MIG) the peak is not known."""
    if "MIG" in name:
        return None
    whole_words = (
        peak for known, peak in _PEAK_BFLOAT16.items() if re.search(rf"\b{known}\b", name)
    )
    return next(whole_words, None)
