"""Token budgets at scale: choosing and ordering a mixture, and planning over a large corpus.

``index``: from the token counts of a task and a general pool to the order of a whole training.
This project's functions against `datasets`: shuffle each pool by seed, select as many examples as
the budget holds, concatenate, shuffle once per epoch. Twice: it sums the token counts of the
shuffled rows to know how many the budget holds, as it has to when a budget is given in tokens; or
it is told how many (``told``), so that only shuffling and selecting are compared. One thread, CPU
seconds, the three in turns.

``plan``: times ``tell plan``, process start included, over a finished curated stage with that many
general examples: a small one, curated here, whose general examples are repeated.

    python benchmarks/token_budgets.py index --examples 1000000
    python benchmarks/token_budgets.py plan --examples 1000000
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_NUM_TASK, _EPOCHS, _SEED = 1000, 3, 0
_SOURCES = ("web", "chat", "code", "maths")
_WEIGHTS = {"web": 3.0, "chat": 2.0, "code": 1.0, "maths": 1.0}
_SHARE = 0.8
_NUM_DISTINCT, _STORE_ROWS = 2000, 2048
_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def main() -> None:
    """Measure what was asked for, print JSON."""
    arguments = _parse()
    measure = {"index": _measure_index, "plan": _measure_plan}[arguments.what]
    print(json.dumps(measure(arguments), indent=1))


def _measure_index(arguments: argparse.Namespace) -> dict[str, Any]:
    pools = _Pools(arguments.examples)
    pairs = []
    for _ in range(arguments.rounds):
        ours, size = _timed(pools.ours)
        theirs, their_size = _timed(pools.with_datasets)
        told, _ = _timed(partial(pools.with_datasets, pools.sizes))
        times = {"tell": ours, "datasets": theirs, "datasets_told": told}
        pairs.append(times | {"ratio": theirs / ours, "ratio_told": told / ours})
        record = pairs[-1] | {"chosen": size, "chosen_by_datasets": their_size}
        print(json.dumps(record), file=sys.stderr, flush=True)
    median = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    return {
        "examples": arguments.examples,
        "epochs": _EPOCHS,
        "pairs": len(pairs),
        "cpu_seconds": {name: round(median[name], 3) for name in times},
        "examples_per_second": round(arguments.examples / median["tell"]),
        "median_ratios": {name: round(median[name], 1) for name in ("ratio", "ratio_told")},
    }


class _Pools:
    """A task and a general pool by their token counts, in both programs' forms."""

    def __init__(self, num_general: int):
        from datasets import Dataset, disable_caching, disable_progress_bars

        from tell_core.data.budgets import source_shares

        disable_caching()
        disable_progress_bars()
        rng = np.random.default_rng(_SEED)
        self.task = rng.integers(20, 200, _NUM_TASK)
        self.general = rng.integers(20, 200, num_general)
        self.names = np.asarray(_SOURCES)[rng.integers(0, len(_SOURCES), num_general)]
        self.budget = int(_SHARE * self.general.sum())
        self.task_budget = int(_SHARE * self.task.sum())
        rows = {"num_tokens": self.general, "row": np.arange(num_general)}
        self.by_source = [
            Dataset.from_dict({key: values[self.names == name] for key, values in rows.items()})
            for name in _SOURCES
        ]
        task_rows = {"num_tokens": self.task, "row": num_general + np.arange(_NUM_TASK)}
        self.task_data = Dataset.from_dict(task_rows)
        shares = source_shares(self.general, self.names, _WEIGHTS, self.budget)
        self.budgets = [self.task_budget, *(shares[name] for name in _SOURCES)]
        self.sizes = [
            _num_within(data.shuffle(seed=_SEED), budget)
            for data, budget in zip([self.task_data, *self.by_source], self.budgets, strict=True)
        ]

    def ours(self) -> int:
        """Choose within the budgets and order all epochs."""
        from tell_core.data.budgets import select_from_sources, select_within_budget
        from tell_core.data.orders import build_order

        task = select_within_budget(self.task, self.task_budget, _SEED)
        general = select_from_sources(self.general, self.names, _WEIGHTS, self.budget, _SEED)
        order = build_order("shuffle", len(task), len(general), _EPOCHS, _SEED)
        size = len(task) + len(general)
        assert (np.bincount(order, minlength=size) == _EPOCHS).all(), "an example is lost"
        return size

    def with_datasets(self, sizes: Sequence[int] | None = None) -> int:
        """The same with `datasets`, which may be told how many examples of each to take."""
        from datasets import concatenate_datasets

        shuffled = [data.shuffle(seed=_SEED) for data in (self.task_data, *self.by_source)]
        if sizes is None:
            sizes = [_num_within(*pair) for pair in zip(shuffled, self.budgets, strict=True)]
        parts = [data.select(range(size)) for data, size in zip(shuffled, sizes, strict=True)]
        mixture = concatenate_datasets(parts)
        epochs = [mixture.shuffle(seed=_SEED + epoch) for epoch in range(_EPOCHS)]
        assert all(len(epoch) == len(mixture) for epoch in epochs), "an example is lost"
        return len(mixture)


def _num_within(data: Any, budget: int) -> int:
    """How many examples of a data set a budget holds; NumPy is its fastest way to a column."""
    counts = data.with_format("numpy")["num_tokens"][:]
    return int(np.searchsorted(np.cumsum(counts), budget, side="right"))


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _measure_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        spec, cells = _write_world(Path(name), arguments.examples)
        command = [sys.executable, "-m", "flows.cli", "plan", str(spec), "--out", f"{name}/run"]
        rounds = [_time_command(command) for _ in range(arguments.rounds + 1)]
    _, *others = rounds  # the first reads the files from disk
    names = ("seconds", "cpu_seconds")
    return {
        "examples": arguments.examples,
        "cells": cells,
        **{key: round(statistics.median(one[key] for one in others), 2) for key in names},
    }


def _write_world(directory: Path, num_examples: int) -> tuple[Path, int]:
    """A specification with its curated stage in ``run``; returns its file and number of cells."""
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from tell_core import pipeline
    from tell_core.data.small_world import WorldSize, write_world
    from tell_core.spec.cells import plan_cells
    from tell_core.spec.loading import load_spec

    size = WorldSize(
        num_pretrain=10, num_general=_NUM_DISTINCT, num_task_train=400, num_task_test=100,
        hidden_size=16, num_layers=1, num_heads=2,
    )  # fmt: skip
    paths = write_world(directory, size, seed=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(paths["base_init"]))
    model.save_pretrained(paths["base_init"])
    fields = {
        "name": "large",
        "model": {"id": str(paths["base_init"])},
        "task": {
            "name": "veil",
            "train": str(directory / "task_train.jsonl"),
            "test": str(directory / "task_test.jsonl"),
        },
        "general": [str(directory / "general.jsonl")],
        "curation": {"max_tokens": 64},
        "budgets": {"task_tokens": [1000, 2000, 4000], "general_tokens": [100_000, 10_000_000]},
        "seeds": [0, 1, 2],
    }
    path = directory / "spec.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    spec = load_spec(path, [])
    small = pipeline.curate_stage(spec, directory / "small").path
    rows = (directory / "general.jsonl").read_text(encoding="utf-8")
    with (directory / "general.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(rows for _ in range(num_examples // _NUM_DISTINCT - 1))
    # The stage of the large sources, its fingerprint theirs, without the minutes of curating them.
    pipeline.curate = lambda _spec, _tokenizer, out, _report: _repeated(small, out, num_examples)
    (directory / "run").mkdir()
    pipeline.curate_stage(spec, directory / "run")
    return path, len(plan_cells(spec))


def _repeated(small: Path, out: Path, num_examples: int) -> None:
    """A curated stage with the general examples of another one over and over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tell_core.data.corpus import Corpus, bare_store_path
    from tell_core.data.token_store import open_writer

    shutil.copytree(small, out, dirs_exist_ok=True)
    (out / "_SUCCESS").unlink()
    corpus = Corpus(small / "general.parquet")
    times = num_examples // corpus.num_examples + 1
    table = pa.concat_tables([pq.read_table(corpus.path)] * times).slice(0, num_examples)
    row = pa.array(np.arange(num_examples))
    pq.write_table(table.set_column(0, "row", row), out / corpus.path.name, compression="zstd")
    with open_writer(
        bare_store_path(out / corpus.path.name), corpus.store.renderer_digest
    ) as writer:
        for start in range(0, num_examples, _STORE_ROWS):
            rows = np.arange(start, min(start + _STORE_ROWS, num_examples))
            writer.append(corpus.encoded(rows % corpus.num_examples, is_task=False))


def _time_command(command: list[str]) -> dict[str, float]:
    before = os.times()
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | _THREADS, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("index", "plan"))
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
