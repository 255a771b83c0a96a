"""Quanta discovery against the scheme that computes gradients anew for every block of pairs.

Both fill the same matrix of the same samples, in one process, in turns; times are CPU seconds. See
`tell_core.analysis.quanta.cost`, whose control is one round of this.

    python benchmarks/quanta.py [--samples 200] [--blocks 10] [--width 64] [--rounds 3]
"""

import argparse
import statistics

import torch

from tell_core.analysis.quanta.cost import compare_schemes, random_model, random_samples


def main() -> None:
    """Run the rounds, print each and their median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, samples = random_model(options.width, options.layers), random_samples(options.samples)
    compare_schemes(model, samples.select(range(8)), 2)  # warm up
    ratios = []
    for number in range(options.rounds):
        found = compare_schemes(model, samples, options.blocks)
        ratios.append(found.speedup)
        print(
            f"round {number + 1}: recomputing {found.recomputing_seconds:.1f} s"
            f" ({found.recomputing_backwards} backwards), once and projected"
            f" {found.once_seconds:.2f} s ({found.once_backwards} backwards): {found.speedup:.1f}x;"
            f" rms error of a cosine {found.cosine_error:.2f} / sqrt(d)",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.1f}x, least {min(ratios):.1f}x")


if __name__ == "__main__":
    main()
