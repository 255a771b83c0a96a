"""Resampling: all draws at once against a loop over draws; and the time of one metric's leverage.

Both score all trainings of three arms at six budgets in resamples of the items; pairs are run in
turn and medians are compared. The loop is as one would write it down: for each draw, for each
training, pick the items and take their score. It is run on fewer draws, and its time scaled up.

    python benchmarks/bootstrap.py --draws 10000 --items 1000 --seeds 5 --pairs 5
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tell_core.analysis.curves import CurvePoint, score_trainings
from tell_core.analysis.resampling import FloatArray, Resampling, item_weights
from tell_core.analysis.summary import leverage_by_arm
from tell_core.evaluation.base import Metric
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.model import MetricSpec

ARMS = (("sft", None), ("sft_matched", 20_000), ("tell", 20_000))
NUM_BUDGETS = 6

Trainings = tuple[CurvePoint, list[FloatArray]]
Seconds = dict[str, float]


def main() -> None:
    """Run the pairs and print medians as JSON."""
    arguments = _parse()
    resampling = Resampling(num_draws=arguments.draws)
    metric = build_metric(MetricSpec(name="exact_match"))
    cells = _cells(arguments.seeds, arguments.items)
    pairs = [
        _all_at_once(metric, cells, resampling)
        | {"loop": _loop(metric, cells, arguments.loop_draws, resampling)}
        for _ in range(arguments.pairs)
    ]
    medians = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    print(
        json.dumps(
            {
                "pairs": pairs,
                "median_seconds": medians,
                "times_faster": medians["loop"] / medians["draws"],
                "num_trainings": len(cells) * arguments.seeds,
            },
            indent=1,
        )
    )


def _cells(num_seeds: int, num_items: int) -> list[Trainings]:
    """For each arm and budget a point without draws yet, and its seeds' statistics."""
    generator = np.random.default_rng(0)
    return [
        (
            CurvePoint(
                arm=arm,
                task_budget_tokens=1000 * 2**place,
                general_budget_tokens=general_budget,
                task_tokens=np.full(num_seeds, 1000.0 * 2**place),
                seeds=tuple(range(num_seeds)),
                scores=np.empty(0),
                item_draws=np.empty(0),
                num_items=num_items,
            ),
            [
                np.stack([generator.random(num_items) < 0.2 + 0.1 * place, np.ones(num_items)], 1)
                for _ in range(num_seeds)
            ],
        )
        for arm, general_budget in ARMS
        for place in range(NUM_BUDGETS)
    ]


def _all_at_once(metric: Metric, cells: Sequence[Trainings], resampling: Resampling) -> Seconds:
    """Seconds to the draws of every training, and to every ratio, interval and p-value."""
    started = time.perf_counter()
    weights = item_weights(cells[0][0].num_items, resampling)
    points = []
    for point, statistics_of_seeds in cells:
        scores, draws = score_trainings(statistics_of_seeds, weights, metric.scores_from_weights)
        points.append(replace(point, scores=scores, item_draws=draws))
    drawn = time.perf_counter()
    leverage_by_arm(metric, points, resampling)
    return {"draws": drawn - started, "full_leverage": time.perf_counter() - started}


def _loop(
    metric: Metric, cells: Sequence[Trainings], num_draws: int, resampling: Resampling
) -> float:
    """Seconds to the draws of every training, one after the other."""
    generator = np.random.default_rng(resampling.seed)
    num_items = cells[0][0].num_items
    started = time.perf_counter()
    for _ in range(num_draws):
        chosen = generator.integers(num_items, size=num_items)
        for _, statistics_of_seeds in cells:
            for one in statistics_of_seeds:
                metric.score_from_items(one[chosen])
    return (time.perf_counter() - started) * resampling.num_draws / num_draws


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--loop-draws", type=int, default=100, help="draws of the loop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
