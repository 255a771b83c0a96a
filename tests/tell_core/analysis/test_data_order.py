"""P5: extensive shuffle against data in an order."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis.data_order import GENERAL_METRIC, shuffle_beats_order
from tell_core.analysis.run_cells import RunCells
from tell_core.analysis.verdicts import judge
from tell_core.evaluation.metrics import build_metric
from tell_core.spec.cells import Cell
from tell_core.spec.model import MetricSpec
from tests.tell_core.analysis.small_runs import (
    NUM_TEST,
    World,
    by_use,
    quantum_world,
    run_spec,
    write_run,
)

ORDERS = ("tell_blocks(4)", "tell_task_first", "tell_task_last")


def run_of(root: Path, losses: dict[str, float]) -> RunCells:
    """A run whose test and general items have these losses by arm; 1 where none is given."""

    def of_arm(cell: Cell, generator: np.random.Generator) -> np.ndarray:
        return losses.get(cell.arm, 1.0) + generator.normal(0, 0.02, NUM_TEST)

    spec = run_spec(
        arms=["base", "tell", *ORDERS], budgets={"task_tokens": [480], "general_tokens": [200]}
    )
    return write_run(root, spec, World(of_arm, quantum_world, by_use, general_test=of_arm))[0]


def test_every_ordered_arm_is_a_part(tmp_path: Path) -> None:
    found = shuffle_beats_order(run_of(tmp_path, {"tell": 0.5}))

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert [part.name for part in found.components] == [
        f"{metric}: tell minus {arm}"
        for metric in ("log_probability", GENERAL_METRIC)
        for arm in ORDERS
    ]


@pytest.mark.parametrize("equal", ORDERS)
def test_one_order_that_is_as_good_leaves_it_undetermined(tmp_path: Path, equal: str) -> None:
    (row,) = judge([shuffle_beats_order(run_of(tmp_path, {"tell": 0.5, equal: 0.5}))], 0.95)

    assert row["verdict"] == "undetermined"
    assert equal in row["reason"]


def test_an_order_that_is_better_contradicts(tmp_path: Path) -> None:
    (row,) = judge([shuffle_beats_order(run_of(tmp_path, {"tell": 0.5, ORDERS[1]: 0.1}))], 0.95)

    assert row["verdict"] == "contradicted"


def test_without_general_items_what_is_forgotten_is_missing(quantum_run) -> None:
    found = shuffle_beats_order(quantum_run[0])

    (row,) = judge([found], 0.95)
    assert row["measure"] == "log_probability: tell minus tell_blocks(4)"
    assert row["verdict"] == "undetermined"
    assert row["reason"].startswith("general_log_probability of tell_blocks(4) beside tell")


def test_the_figure_has_the_scores_of_every_arm_with_intervals(tmp_path: Path) -> None:
    figure = shuffle_beats_order(run_of(tmp_path, {"tell": 0.5})).figure

    scores = {(row["metric"], row["arm"]): row for row in figure["order_scores"]}
    assert set(scores) == {
        (metric, arm)
        for metric in ("log_probability", GENERAL_METRIC)
        for arm in ("tell", *ORDERS, "base")
    }
    tell = scores["log_probability", "tell"]
    assert tell["low"] < tell["mean"] < tell["high"]
    assert [row["arm"] for row in figure["orders"]] == [*ORDERS, *ORDERS]


def test_of_a_metric_whose_small_scores_are_good_less_is_predicted(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"tell": 0.5})
    error_rate = build_metric(MetricSpec(name="character_error_rate"))
    run = replace(run, metrics={**run.metrics, "log_probability": error_rate})

    part = run.difference("log_probability", "tell", ORDERS[0], "less")

    assert part is not None and part.estimate > 0 and not part.is_as_predicted
