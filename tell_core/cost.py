"""What cells cost in time on this machine, before they run.

The speed of a matrix product is measured, training reaches a known share of it, and what a token
costs follows from the number of parameters. Where trainings of the same run are finished already,
their speed replaces the estimate.
"""

import math
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from tell_core.data.pools import open_pools
from tell_core.evaluation.metrics import build_metrics
from tell_core.lanes import num_lanes
from tell_core.pipeline import Stage, renderer_of
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tell_core.training.devices import cpu_threads, resolve_device, resolve_precision

# Floating-point operations per parameter and token: 2 forward, 2 backward to the activations, and 2
# more to the weights where all of them are trained.
_TRAIN_FLOP = {"lora": 4, "full": 6}
_FORWARD_FLOP = 2
# Writing a token takes longer than reading one: batches are small and the cache is moved about.
_WRITE_FACTOR = 4
# Share of a matrix product's speed that training reached on one CPU thread: 0.38 for SmolLM2-135M
# (LoRA, bfloat16), 0.23 for the demo's 0.3 M parameters.
_EFFICIENCY = 0.35


@dataclass(frozen=True)
class Cost:
    """What a token costs, and what every cell has to read beside its mixture.

    Attributes:
        train_seconds_per_token: Of a training, forward and backward.
        forward_seconds_per_token: Of reading a token in evaluation.
        probe_tokens: Tokens whose loss is measured in the course of one training.
        item_tokens: Tokens of all test items, gold responses included.
        written_tokens: Tokens generated for them, if they are as long as the gold responses; 0
            when no metric looks at generated text.
        num_lanes: Cells that run side by side.
        is_measured: Whether the speed is that of finished trainings of this run.
    """

    train_seconds_per_token: float
    forward_seconds_per_token: float
    probe_tokens: int
    item_tokens: int
    written_tokens: int
    num_lanes: int
    is_measured: bool

    def training_seconds(self, ledger: Mapping[str, Any]) -> float:
        """One training of a cell, its probes included."""
        trained = float(ledger["rendered_tokens"]) * self.train_seconds_per_token
        return trained + self.probe_tokens * self.forward_seconds_per_token

    @property
    def evaluation_seconds(self) -> float:
        """One evaluation: every item is read twice, before it is answered and to score its gold."""
        written = _WRITE_FACTOR * self.written_tokens
        read = self.item_tokens * (2 if self.written_tokens else 1)
        return (read + written) * self.forward_seconds_per_token


def estimate_cost(spec: ExperimentSpec, curated: Stage, parameters: int) -> Cost:
    """Measure this machine for a second, or take what finished trainings of the run say."""
    train_flop = parameters * _TRAIN_FLOP[spec.training.method]
    measured = _measured_tokens_per_second(curated.root)
    train = 1 / measured if measured else train_flop / (_matrix_flops(spec) * _EFFICIENCY)
    pools = open_pools(curated.path, renderer_of(spec))
    test = pools.corpus("task_test")
    share = min(1.0, (spec.evaluation.max_items or math.inf) / test.num_examples)
    anchored = test.num_tokens.sum() + test.num_examples * pools.anchor.num_tokens
    generates = any(metric.needs_generation for metric in build_metrics(spec.evaluation))
    written = test.num_response_tokens.clip(max=spec.evaluation.max_new_tokens).sum()
    return Cost(
        train_seconds_per_token=train,
        forward_seconds_per_token=train * _FORWARD_FLOP / _TRAIN_FLOP[spec.training.method],
        probe_tokens=_probe_tokens(spec, curated),
        item_tokens=int(anchored * share),
        written_tokens=int(written * share) * spec.evaluation.num_repeats if generates else 0,
        num_lanes=num_lanes(spec.training),
        is_measured=measured is not None,
    )


def num_parameters(directory: Path) -> int:
    """Parameters of a model, from the headers of its weight files."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _probe_tokens(spec: ExperimentSpec, curated: Stage) -> int:
    pools = open_pools(curated.path, renderer_of(spec))
    dev = pools.corpus("task_dev")
    tokens = dev.num_tokens.sum() + dev.num_examples * pools.anchor.num_tokens
    tokens += pools.corpus("general_heldout").num_tokens.sum()
    retention = pools.corpus("retention").num_tokens
    if len(retention):
        tokens += retention.mean() * min(len(retention), spec.curation.retention_examples)
    return int(tokens * spec.training.num_probes)


def _measured_tokens_per_second(root: Path) -> float | None:
    """Median over the finished trainings of a run directory, or None."""
    found = [
        read_json(path)["tokens_per_second"]
        for path in (root / "stages").glob("train-*/summary.json")
    ]
    return median(found) if found else None


def _matrix_flops(spec: ExperimentSpec) -> float:
    """Measured speed of a matrix product as training will compute it, in FLOP per second.

    A GPU is asked by a process of its own: who has computed there keeps some of its memory, and a
    GPU that serves one process at a time would refuse the trainings that follow.
    """
    device = resolve_device(spec.training.device)
    precision = resolve_precision(spec.model.dtype, device, spec.training.method)
    arguments = (device, precision.compute or precision.weights, spec.training.threads)
    if device.type == "cpu":
        return _product_flops(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_product_flops, *arguments).result()


def _product_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The best of a few products, in FLOP per second."""
    size = 4096 if device.type == "cuda" else 512
    best = math.inf
    with cpu_threads(threads):
        matrix = torch.randn(size, size, device=device).to(dtype)
        for _ in range(8):
            start = time.perf_counter()
            (matrix @ matrix).flatten()[0].item()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
