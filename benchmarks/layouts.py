"""What a training step costs in each layout, and at each size of a forward pass.

Every measurement is a process of its own, which gives its peak memory; rounds go through all of
them in turn. CPU seconds are compared. Sizes that give the same forward passes are measured once.
With --compiled each layer of the model is compiled by torch as well (packs differ in length, hence
with dynamic shapes), and the first step, which compiles, is told apart from the others.

    tell mix configs/halu_smollm2_cpu.yaml --set data=DIRECTORY --set model=MODEL --out RUN
    python benchmarks/layouts.py --mixture RUN/stages/mix-... --model MODEL --dtype bfloat16
    python benchmarks/layouts.py --mixture RUN/stages/mix-... --model MODEL --compiled --steps 4
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from tell_core.data.encoding import Mixture, from_lists
from tell_core.data.token_store import open_mixture
from tell_core.spec.model import TrainingSpec
from tell_core.training.batching import Layout, Limits, count_batches
from tell_core.training.devices import (
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from tell_core.training.models import attach_lora, load_model
from tell_core.training.trainer import Trainer

LAYOUTS: tuple[Layout, ...] = ("packed", "length_grouped", "padded")


def main() -> None:
    """Measure every kind of step in turn, or one of them, and print JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    if arguments.alone:
        print(json.dumps(_measure(arguments)))
        return
    mixture = _first_steps(arguments)
    kinds = list(_kinds(arguments, mixture))
    found: list[list[dict[str, Any]]] = [[] for _ in kinds]
    for turn in range(arguments.rounds):
        for kind, results in zip(kinds, found, strict=True):
            results.append(_in_own_process(kind))
            print(f"round {turn}: {kind} {results[-1]}", file=sys.stderr, flush=True)
    rows = [kind | _medians(results) for kind, results in zip(kinds, found, strict=True)]
    useful = int(mixture.examples.lengths[mixture.order].sum())
    print(json.dumps({"useful_tokens": useful, "steps": arguments.steps, "rows": rows}, indent=1))


def _kinds(arguments: argparse.Namespace, mixture: Mixture) -> Iterator[dict[str, Any]]:
    """Layouts and sizes that differ in their forward passes, with what is known beforehand."""
    known = set()
    for layout in arguments.layouts:
        for size in arguments.sizes:
            limits = Limits(layout, None, size)
            counts = count_batches(
                mixture.examples.lengths, mixture.order, arguments.batch_size, limits
            )
            passes = (layout, counts.forward_passes, counts.padded_tokens)
            if passes in known:
                continue
            known.add(passes)
            kind = {"layout": layout, "size": size, "forward_passes": counts.forward_passes}
            kind |= {"padding_share": round(counts.padding_share, 3)}
            yield kind | {"is_compiled": False}
            if arguments.compiled:
                yield kind | {"is_compiled": True}


def _in_own_process(kind: dict[str, Any]) -> dict[str, Any]:
    own = ["--alone", "--layouts", kind["layout"], "--sizes", str(kind["size"])]
    own += ["--compiled"] if kind["is_compiled"] else []
    shared = [word for word in sys.argv[1:] if word != "--compiled"]
    done = subprocess.run([sys.executable, __file__, *shared, *own], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def _medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """CPU seconds of a step, of all rounds, and the largest peak of memory."""
    later = [statistics.fmean(one["seconds"][1:] or one["seconds"]) for one in results]
    return {
        "first_step_seconds": [round(one["seconds"][0], 2) for one in results],
        "step_seconds": [round(seconds, 3) for seconds in later],
        "median_step_seconds": round(statistics.median(later), 3),
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in results),
    }


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of each step of one kind, and the peak of this process."""
    (layout,), (size,) = arguments.layouts, arguments.sizes
    device = resolve_device("cpu")
    precision = resolve_precision(arguments.dtype, device)
    training = TrainingSpec(
        learning_rate=1e-4, epochs=1, batch_size=arguments.batch_size, num_probes=2, keep="last",
        warmup_fraction=0, device="cpu", batching=layout, micro_batch_tokens=size,
    )  # fmt: skip
    torch.manual_seed(0)
    model = attach_lora(
        load_model(str(arguments.model), dtype=arguments.dtype, device=device).model, training
    ).train()
    nothing = from_lists([], True)
    trainer = Trainer(model, _first_steps(arguments), nothing, training, 0, device, precision)
    if arguments.compiled:
        _compile_layers(model)
    reset_peak_memory(device)
    with trainer.engine.attended():
        seconds = [_timed_step(trainer) for _ in range(arguments.steps)]
    return {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(device)}


def _compile_layers(model: torch.nn.Module) -> None:
    """Compile each layer by itself: one code for all of them, whatever the length of a pack."""
    layers = next(
        module
        for name, module in model.named_modules()
        if name.endswith("layers") and isinstance(module, torch.nn.ModuleList)
    )
    for layer in layers:
        layer.compile(dynamic=True)


def _timed_step(trainer: Trainer) -> float:
    started = time.process_time()
    trainer.train_step()
    return time.process_time() - started


def _first_steps(arguments: argparse.Namespace) -> Mixture:
    """As much of the mixture as the steps take."""
    whole = open_mixture(arguments.mixture)
    order = whole.order[: arguments.steps * arguments.batch_size]
    rows, inverse = np.unique(order, return_inverse=True)
    return Mixture(whole.examples.select(rows), inverse.astype(np.int32))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mixture", type=Path, required=True, help="a mix stage")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1024, 2048, 4096, 8192], help="tokens"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="the first one warms up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="each kind compiled as well")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
