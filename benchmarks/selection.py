"""Selection against random choice of general data, in the small world.

Every arm trains on the same task examples with the same settings; only which general examples the
budget takes differs. Scores are those of the test items. The noise to compare with is the
difference between seeds, for all arms the same task examples and order seeds.

    tell demo --out runs/demo --no-track     # makes the world, once
    python benchmarks/selection.py runs/demo/stages/world-* --seeds 0 1 2
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flows.demo_files import demo_settings, demo_spec
from tell_core.pipeline import Stage, curate_stage, run_cell
from tell_core.spec.cells import plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json

METRICS = ("log_probability", "exact_match", "general_log_probability")


def main() -> None:
    """Train every cell; print a line per cell, then the means and paired differences as JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    spec = _spec(arguments)
    with tempfile.TemporaryDirectory() as name:
        curated = curate_stage(spec, Path(name))
        rows = [_row(spec, curated, cell) for cell in plan_cells(spec)]
    print(json.dumps(_summary(rows), indent=1))


def _spec(arguments: argparse.Namespace) -> ExperimentSpec:
    settings = [
        *demo_settings(arguments.world.absolute()),
        f"arms={['tell', *arguments.arms]}",
        f"seeds={arguments.seeds}",
        f"budgets.task_tokens={arguments.task_tokens}",
        f"budgets.general_tokens={arguments.general_tokens}",
        f"training.learning_rate={arguments.learning_rate}",
    ]
    return load_spec(demo_spec(), settings)


def _row(spec: ExperimentSpec, curated: Stage, cell: Any) -> dict[str, Any]:
    start = time.process_time()
    outcome = run_cell(spec, cell, curated, spec.training.candidates[0])
    scores = read_json(outcome.evaluated.path / "scores.json")
    row = {
        "arm": cell.arm,
        "task_tokens": cell.task_budget_tokens,
        "general_tokens": cell.general_budget_tokens,
        "seed": cell.seed,
        **{metric: scores[metric]["score"] for metric in METRICS},
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    print(json.dumps(row), flush=True)
    return row


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per budgets and arm: the mean over seeds, and its paired difference to random choice."""
    found: dict[tuple[int, int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["task_tokens"], row["general_tokens"], row["arm"])
        found.setdefault(key, {})[row["seed"]] = row
    summary = []
    for (task, general, arm), by_seed in sorted(found.items()):
        random = found[task, general, "tell"]
        entry: dict[str, Any] = {"task_tokens": task, "general_tokens": general, "arm": arm}
        for metric in METRICS:
            scores = [row[metric] for row in by_seed.values()]
            gains = [row[metric] - random[seed][metric] for seed, row in by_seed.items()]
            spread = statistics.stdev(gains) if len(gains) > 1 else None
            entry[metric] = {"mean": statistics.mean(scores), "gain": statistics.mean(gains)}
            entry[metric] |= {"sd_of_gain": spread}
        summary.append(entry)
    return summary


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path, help="directory of a world stage")
    parser.add_argument("--arms", nargs="+", default=["tell_diverse"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--task-tokens", nargs="+", type=int, default=[480, 960])
    parser.add_argument("--general-tokens", nargs="+", type=int, default=[3000, 9000])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
