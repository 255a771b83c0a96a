"""Quanta discovery against the scheme that computes gradients anew for every block of pairs.

The public notebooks of arXiv 2303.13506 fill the matrix of cosines block by block, and take the
gradients of both blocks again each time: 6500 backwards for 1000 samples in blocks of 100. Here
every sample goes backward once, batched, and its gradient is projected. Both fill the same matrix
of the same samples, in one process, in turns; times are CPU seconds.

    python benchmarks/quanta.py [--samples 200] [--blocks 10] [--width 64] [--rounds 3]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tell_core.analysis.quanta.clustering import cosine_distances
from tell_core.analysis.quanta.gradients import looped_gradients, project_gradients
from tell_core.analysis.quanta.projection import CountSketch
from tell_core.data.encoding import EncodedExamples, from_lists

VOCABULARY = 300
DIMENSIONS = 4096


def random_model(width: int, num_layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def random_samples(count: int) -> EncodedExamples:
    """Contexts of 16 to 48 random tokens with one supervised token at the end."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(16, 49, count)
    rows = [(generator.integers(0, VOCABULARY, length), int(length) - 1) for length in lengths]
    return from_lists(rows, is_task=False)


def recomputed_cosines(
    model: nn.Module, samples: EncodedExamples, num_blocks: int
) -> tuple[np.ndarray, int]:
    """Cosines (S, S) and backwards of the scheme that takes gradients again for every block."""
    blocks = np.array_split(np.arange(len(samples)), num_blocks)
    cosines = np.zeros((len(samples), len(samples)))
    num_backwards = 0
    for place, rows in enumerate(blocks):
        left = _unit(looped_gradients(model, samples.select(rows)))
        num_backwards += len(rows)
        for columns in blocks[place:]:
            right = _unit(looped_gradients(model, samples.select(columns)))
            num_backwards += len(columns)
            found = left @ right.T
            cosines[np.ix_(rows, columns)] = found
            cosines[np.ix_(columns, rows)] = found.T
    return cosines, num_backwards


def projected_cosines(model: nn.Module, samples: EncodedExamples) -> tuple[np.ndarray, int]:
    """The same from gradients taken once."""
    found = project_gradients(model, samples, CountSketch(DIMENSIONS))
    return 1 - cosine_distances(found.vectors), found.num_backwards


def _unit(gradients: np.ndarray) -> np.ndarray:
    return gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, samples = random_model(options.width, options.layers), random_samples(options.samples)
    projected_cosines(model, samples.select(range(8)))  # warm up
    ratios = []
    for number in range(options.rounds):
        started = time.process_time()
        reference, num_reference = recomputed_cosines(model, samples, options.blocks)
        between = time.process_time()
        found, num_found = projected_cosines(model, samples)
        slow, fast = between - started, time.process_time() - between
        ratios.append(slow / fast)
        pairs = np.triu_indices(len(samples), 1)
        error = np.sqrt(np.mean((found[pairs] - reference[pairs]) ** 2) * DIMENSIONS)
        print(
            f"round {number + 1}: recomputing {slow:.1f} s ({num_reference} backwards), once and"
            f" projected {fast:.2f} s ({num_found} backwards): {slow / fast:.1f}x; rms error of a"
            f" cosine {error:.2f} / sqrt(d)",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.1f}x, least {min(ratios):.1f}x")


if __name__ == "__main__":
    main()
