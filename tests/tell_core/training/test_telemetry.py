from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tell_core.data.encoding import EncodedExamples
from tell_core.training.collation import collate
from tell_core.training.devices import Precision
from tell_core.training.losses import supervised_nll
from tell_core.training.models import LoadedModel, attach_lora, detach_adapter
from tell_core.training.telemetry import (
    ModelSizes,
    _peak_of_gpu,
    model_sizes,
    peak_flops,
    step_flops,
)

CPU = torch.device("cpu")


def test_operations_are_those_that_torch_counts_in_a_full_training_step(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    """Of matrices: torch's counter knows no attention kernel of the CPU, and leaves out norms."""
    examples = random_examples(1, 0)
    batch = collate(examples, [0], CPU)
    base.model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        supervised_nll(base.model, batch).sum().backward()
    base.model.zero_grad(set_to_none=True)

    matrices = model_sizes(base.model)._replace(attended_width=0)
    counted = step_flops(matrices, examples.lengths, int(examples.supervised_counts[0]))

    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_pays_for_pairs_of_tokens_that_see_each_other():
    """Two products of 3 x 2 operations for each of 1 + 2 + 3 pairs, in 5 numbers each."""
    attention = ModelSizes(body=0, head=0, attended_width=5)

    assert step_flops(attention, np.array([3]), 1) == 2 * 6 * 6 * 5


def test_adapters_are_not_counted(base: LoadedModel, training_spec: Callable[..., object]):
    alone = model_sizes(base.model)

    adapted = attach_lora(base.model, training_spec())  # type: ignore[arg-type]
    found = model_sizes(adapted)
    detach_adapter(adapted)

    assert found == alone


def test_the_peak_of_a_cpu_is_measured_once():
    precision = Precision(torch.float32, None)

    first = peak_flops(CPU, precision, 1)

    assert first is not None
    assert first > 1e8
    assert peak_flops(CPU, precision, 1) == first


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(name: str, peak: float | None):
    assert _peak_of_gpu(name) == peak
