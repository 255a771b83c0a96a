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

import time
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import IntArray
from tell_core.training.devices import Precision

# Dense matrix products in bfloat16, without sparsity, as the makers' data sheets give them.
_PEAK_BFLOAT16 = {
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
        body: Weights within layers.
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
    """Sizes of a causal language model, with or without adapters."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    outside = {id(weight) for table in tables if table for weight in table.parameters()}
    named = model.named_parameters()
    body = sum(w.numel() for n, w in named if id(w) not in outside and "lora_" not in n)
    head = sum(weight.numel() for weight in tables[1].parameters()) if tables[1] else 0
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelSizes(body, head, config.num_hidden_layers * width)


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
        name = torch.cuda.get_device_name(device)
        return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)
    del threads  # part of what the measurement is remembered by
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * _MATRIX_SIZE**3 / best
