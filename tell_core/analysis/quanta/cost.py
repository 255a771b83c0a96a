"""What gradients taken once save, against the scheme that takes them anew for every block of pairs.

The public notebooks of arXiv 2303.13506 fill the matrix of cosines block by block, and take the
gradients of both blocks again each time: 6500 backwards for 1000 samples in blocks of 100. Here
every sample goes backward once, batched, and its gradient is projected.

Shape letters: S samples.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tell_core.analysis.quanta.acceptance import Check
from tell_core.analysis.quanta.clustering import FloatArray, cosine_distances
from tell_core.analysis.quanta.controls import settled
from tell_core.analysis.quanta.gradients import looped_gradients, project_gradients
from tell_core.analysis.quanta.projection import CountSketch
from tell_core.data.encoding import EncodedExamples, from_lists

MIN_SPEEDUP = 10.0
_VOCABULARY = 300
_DIMENSIONS = 4096
_NUM_SAMPLES, _NUM_BLOCKS = 100, 10


class Compared(NamedTuple):
    """Both schemes on the same samples.

    Attributes:
        recomputing_seconds: CPU seconds of the scheme that takes gradients anew.
        once_seconds: CPU seconds of ours.
        recomputing_backwards: Samples that went backward, counted in the model.
        once_backwards: The same of ours.
        cosine_error: Root mean square difference of the cosines, times the root of dimensions.
    """

    recomputing_seconds: float
    once_seconds: float
    recomputing_backwards: int
    once_backwards: int
    cosine_error: float

    @property
    def speedup(self) -> float:
        """How much faster ours is."""
        return self.recomputing_seconds / self.once_seconds


def check_cost() -> list[Check]:
    """Both schemes in one process on the same work: backwards counted, CPU time compared."""
    with settled():
        model, samples = random_model(width=64, num_layers=3), random_samples(_NUM_SAMPLES)
        project_gradients(model, samples.select(range(8)), CountSketch(_DIMENSIONS))  # warm up
        found = compare_schemes(model, samples, _NUM_BLOCKS)
    counts = f"{found.once_backwards}, recomputing {found.recomputing_backwards}"
    return [
        Check(
            f"cost of gradients: backwards for {_NUM_SAMPLES} samples",
            f"{_NUM_SAMPLES}, counted in the model",
            counts,
            found.once_backwards == _NUM_SAMPLES,
            0.0,
        ),
        Check(
            "cost of gradients: CPU time of the recomputing scheme over ours",
            f">= {MIN_SPEEDUP:g}",
            f"{found.speedup:.1f}",
            found.speedup >= MIN_SPEEDUP,
            found.recomputing_seconds + found.once_seconds,
        ),
    ]


def compare_schemes(model: nn.Module, samples: EncodedExamples, num_blocks: int) -> Compared:
    """Fill the cosines of the samples by either scheme.

    Args:
        model: Causal language model in float32 on the CPU.
        samples: S samples with one supervised token each.
        num_blocks: Blocks of the recomputing scheme.
    """
    with _counted(model) as recomputing:
        started = time.process_time()
        expected = _recomputed_cosines(model, samples, num_blocks)
        between = time.process_time()
    with _counted(model) as once:
        again = time.process_time()
        vectors = project_gradients(model, samples, CountSketch(_DIMENSIONS)).vectors
        found = 1 - cosine_distances(vectors)
        ended = time.process_time()
    pairs = np.triu_indices(len(samples), 1)
    error = float(np.sqrt(np.mean((found[pairs] - expected[pairs]) ** 2) * _DIMENSIONS))
    return Compared(between - started, ended - again, sum(recomputing), sum(once), error)


def random_model(width: int, num_layers: int) -> nn.Module:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def random_samples(count: int) -> EncodedExamples:
    """Contexts of 16 to 48 random tokens with one supervised token at the end."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(16, 49, count)
    rows = [(generator.integers(0, _VOCABULARY, length), int(length) - 1) for length in lengths]
    return from_lists(rows, is_task=False)


def _recomputed_cosines(model: nn.Module, samples: EncodedExamples, num_blocks: int) -> FloatArray:
    """Cosines (S, S) of the scheme that takes gradients again for every block."""
    blocks = np.array_split(np.arange(len(samples)), num_blocks)
    cosines = np.zeros((len(samples), len(samples)))
    for place, rows in enumerate(blocks):
        left = _unit_gradients(model, samples.select(rows))
        for columns in blocks[place:]:
            found = left @ _unit_gradients(model, samples.select(columns)).T
            cosines[np.ix_(rows, columns)] = found
            cosines[np.ix_(columns, rows)] = found.T
    return cosines


def _unit_gradients(model: nn.Module, samples: EncodedExamples) -> FloatArray:
    gradients = looped_gradients(model, samples).astype(np.float64)
    return np.asarray(gradients / np.linalg.norm(gradients, axis=1, keepdims=True))


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Samples of each backward through the model's first layer, as they come."""
    counts: list[int] = []

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.append(len(gradient)))  # type: ignore[no-untyped-call]

    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    hook = first.register_forward_hook(watch)
    try:
        yield counts
    finally:
        hook.remove()
