"""Share of a training's time that goes into checkpoints, at the default interval.

A training whose weights and optimiser state are as large as those of the real one writes a
checkpoint several times; what one costs, over the seconds between two of them, is the share.

    python benchmarks/checkpoints.py --model MODEL --method lora
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tell_core.data.encoding import Mixture, from_lists
from tell_core.spec.model import TrainingSpec
from tell_core.training.checkpoints import (
    AUTO_SECONDS,
    auto_interval,
    load_checkpoint,
    save_checkpoint,
)
from tell_core.training.devices import resolve_device, resolve_precision
from tell_core.training.models import attach_lora, load_model
from tell_core.training.trainer import Trainer


def main() -> None:
    """Measure and print JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    training = TrainingSpec(
        method=arguments.method, learning_rate=1e-4, epochs=1, batch_size=1, num_probes=2,
        keep="last", device=arguments.device,
    )  # fmt: skip
    trainer = _trainer(arguments.model, training)
    trainer.train_step()  # so that the optimiser has its moments
    with tempfile.TemporaryDirectory(dir=arguments.disk) as directory:
        path = Path(directory)
        written = [_write(trainer, path) for _ in range(arguments.repeats)]
        num_bytes = sum(f.stat().st_size for f in max(path.glob("step-*")).iterdir())
        started = time.perf_counter()
        load_checkpoint(path, "benchmark")
        read = time.perf_counter() - started
    seconds = statistics.median(written)
    print(
        json.dumps(
            {
                "bytes": num_bytes,
                "write_seconds": written,
                "read_seconds": read,
                "interval_seconds": auto_interval(seconds),
                "share_of_training": seconds / (auto_interval(seconds) + seconds),
                "share_at_a_minute": seconds / (AUTO_SECONDS + seconds),
            },
            indent=1,
        )
    )


def _trainer(model_path: Path, training: TrainingSpec) -> Trainer:
    device = resolve_device(training.device)
    is_full = training.method == "full"
    base = load_model(str(model_path), dtype="float32", device=device, is_full=is_full).model
    model = base.requires_grad_(True) if is_full else attach_lora(base, training)
    examples = from_lists([([1, 2, 3, 4], 2), ([1, 2, 3], 2)], True)
    mixture = Mixture(examples, np.arange(2, dtype=np.int32))
    precision = resolve_precision("float32", device, training.method)
    return Trainer(model, mixture, from_lists([], True), training, 0, device, precision)


def _write(trainer: Trainer, directory: Path) -> float:
    started = time.perf_counter()
    save_checkpoint(directory, trainer.capture("benchmark"))
    return time.perf_counter() - started


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--disk", type=Path, help="directory to write in; default: temporary")
    return parser.parse_args()


if __name__ == "__main__":
    main()
