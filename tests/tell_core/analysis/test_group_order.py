"""P2: shared units before specific ones."""

from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis import time_regression
from tell_core.analysis.group_order import group_effect, shared_before_specific
from tell_core.analysis.registration import register_split
from tell_core.analysis.resampling import Resampling
from tell_core.analysis.sequence import LearningTimes
from tell_core.analysis.time_regression import Observations
from tell_core.analysis.verdicts import judge
from tests.tell_core.analysis.small_runs import (
    NUM_TASK,
    QUANTUM,
    World,
    by_use,
    fall,
    one_seed_of,
    quantum_world,
    run_spec,
    stepping_tests,
    write_run,
)


def test_shared_units_come_first_and_general_data_moves_them_alone(quantum_run) -> None:
    run, cells, root = quantum_run
    split = register_split(cells, root / "split.json")

    found = shared_before_specific(run, split)

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert found.components[1].estimate == pytest.approx(0.5, abs=0.15)
    # Nothing rises again here, so that both definitions of learned give the same.
    assert f"the first part is {found.components[0].estimate:.2f}" in found.remark
    assert split.counts() == {"shared": NUM_TASK // 2, "specific": NUM_TASK // 2,
                              "neither": 0, "known": 0}  # fmt: skip


def test_groups_that_move_alike_do_not_support_the_order(tmp_path: Path) -> None:
    def alike(cell, generator):
        if cell.arm in ("sft", "general_only"):
            return quantum_world(cell, generator)
        return fall(3 + generator.normal(0, 0.3, NUM_TASK))

    few = run_spec(budgets={"task_tokens": [480], "general_tokens": [200, 1050, 9400]})
    run, cells = write_run(tmp_path, few, World(stepping_tests, alike, by_use))

    found = shared_before_specific(run, register_split(cells, tmp_path / "split.json"))

    assert judge([found], 0.95)[0]["verdict"] != "supported"


def without_effect(generator: np.random.Generator, num_seeds: int = 3, num_items: int = 20):
    """Groups that are alike on average; in each training they differ by chance, sd 0.2."""
    seeds = np.repeat(np.arange(num_seeds), num_items)
    items = np.tile(np.arange(num_items), num_seeds)
    is_shared = items % 2 == 0
    of_seed = generator.normal(0, 0.2, num_seeds)[seeds] * np.where(is_shared, -0.5, 0.5)
    log_times = 3 + of_seed + generator.normal(0, 0.2, len(seeds))
    every = np.ones(len(seeds), dtype=bool)
    times = LearningTimes(
        log_times, np.zeros(len(seeds), dtype=np.int64), every, ~every,
        np.exp(generator.normal(0, 0.2, len(seeds))),
    )  # fmt: skip
    return Observations(times, items, seeds), is_shared


def test_what_differs_from_training_to_training_is_seldom_taken_for_an_effect(monkeypatch) -> None:
    monkeypatch.setattr(time_regression, "_NUM_CLUSTER_DRAWS", 100)
    generator, one_budget = np.random.default_rng(0), np.full(60, 7.0)

    p_values = [
        group_effect(*without_effect(generator), one_budget, Resampling()).p_value
        for _ in range(100)
    ]

    assert np.mean(np.array(p_values) < 0.05) <= 0.08


def test_one_training_does_not_determine_the_order(quantum_run) -> None:
    run, cells, root = quantum_run
    split = register_split(cells, root / "split.json")

    found = shared_before_specific(one_seed_of(run), split)

    assert found.needs == "at least 3 seeds of tell; this run has 1"
    assert judge([found], 0.95)[0]["verdict"] == "undetermined"


def test_one_general_budget_is_not_held_against_the_intercept(tmp_path: Path) -> None:
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [9400]})
    run, cells = write_run(tmp_path, spec, QUANTUM)

    found = shared_before_specific(run, register_split(cells, tmp_path / "split.json"))

    (effect,) = found.components
    assert effect.low < effect.estimate < effect.high
