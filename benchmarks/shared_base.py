"""Many small cells over one base model: in one process, and in a process of its own each.

The cells differ in their seed. CPU seconds are compared; with --processes fewer cells are also run
alone, and their mean stands for all. The adapters of a cell must be equal bit for bit both ways.

    python benchmarks/shared_base.py --mixture RUN/stages/mix-... --model MODEL --cells 20
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tell_core.spec.model import TrainingSpec
from tell_core.training.loop import train_cell


def main() -> None:
    """Run the cells both ways and print JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    if arguments.seed is not None:
        _train(arguments, arguments.seed, arguments.out)
        return
    with tempfile.TemporaryDirectory() as directory:
        shared, alone = Path(directory, "shared"), Path(directory, "alone")
        started = _children_seconds()
        for seed in range(arguments.processes):
            command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(seed)]
            subprocess.run([*command, "--out", str(alone / str(seed))], check=True)
        alone_seconds = (_children_seconds() - started) / arguments.processes
        begun = time.process_time()
        for seed in range(arguments.cells):
            _train(arguments, seed, shared / str(seed))
        shared_seconds = (time.process_time() - begun) / arguments.cells
        equal = all(
            _weights(shared / str(seed)) == _weights(alone / str(seed))
            for seed in range(arguments.processes)
        )
    print(
        json.dumps(
            {
                "cells": arguments.cells,
                "cpu_seconds_per_cell": {
                    "one process": shared_seconds,
                    "each alone": alone_seconds,
                },
                "faster_by": alone_seconds / shared_seconds,
                "adapters_equal": equal,
            },
            indent=1,
        )
    )


def _train(arguments: argparse.Namespace, seed: int, out: Path) -> None:
    training = TrainingSpec(
        learning_rate=1e-3, epochs=1, batch_size=16, num_probes=2, keep="last", device="cpu"
    )
    train_cell(
        model_path=str(arguments.model), revision=None, inputs=arguments.mixture,
        training=training, seed=seed, out=out,
    )  # fmt: skip


def _weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mixture", type=Path, required=True, help="a mix stage")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
