import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell_core.analysis import mechanism
from tell_core.analysis.mechanism import (
    Observations,
    RunCells,
    emergence_with_data,
    group_effect,
    learning_orders,
    leverage_above_one,
    shared_before_specific,
    shuffle_beats_order,
    time_by_frequency,
)
from tell_core.analysis.registration import register_split
from tell_core.analysis.resampling import Resampling
from tell_core.analysis.sequence import LearningTimes
from tell_core.analysis.verdicts import judge
from tests.tell_core.analysis.small_runs import (
    NUM_TASK,
    SKILLS,
    World,
    by_use,
    fall,
    quantum_world,
    run_spec,
    smooth_tests,
    stepping_tests,
    write_run,
)

QUANTUM = World(stepping_tests, quantum_world, by_use)


def write_general(directory: Path) -> Path:
    """Curated general data whose skills have the shares of `SKILLS`, the rest another skill."""
    names = [name for name, share in SKILLS.items() for _ in range(round(1000 * share))]
    names += ["other"] * (1000 - len(names))
    extra = [json.dumps({"skill": name}) for name in names]
    pq.write_table(pa.table({"extra": extra}), directory / "general.parquet")
    return directory


@pytest.fixture(scope="module")
def quantum_run(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("quantum")
    run, cells = write_run(root, run_spec(), QUANTUM)
    return run, cells, root


def test_steps_in_the_amount_of_general_data_are_emergence(quantum_run) -> None:
    found = emergence_with_data(quantum_run[0])

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert row["estimate"] > 0.8


def test_smooth_falls_are_no_emergence(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, run_spec(), World(smooth_tests, quantum_world, by_use))

    (row,) = judge([emergence_with_data(run)], 0.95)

    assert row["verdict"] != "supported"


def test_emergence_with_few_budgets_says_how_many_it_needs(tmp_path: Path) -> None:
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [200, 600, 9400]})
    run, _ = write_run(tmp_path, spec, QUANTUM)

    assert emergence_with_data(run).needs == ("at least 8 general budgets for tell; this run has 3")


def test_shared_units_come_first_and_general_data_moves_them_alone(quantum_run) -> None:
    run, cells, root = quantum_run
    split = register_split(cells, root / "split.json")

    found = shared_before_specific(run, split)

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert found.components[1].estimate == pytest.approx(0.5, abs=0.15)
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
    monkeypatch.setattr(mechanism, "_NUM_CLUSTER_DRAWS", 100)
    generator, one_budget = np.random.default_rng(0), np.full(60, 7.0)

    p_values = [
        group_effect(*without_effect(generator), one_budget, Resampling()).p_value
        for _ in range(100)
    ]

    assert np.mean(np.array(p_values) < 0.05) <= 0.08


def one_seed_of(run: RunCells) -> RunCells:
    cells = tuple(cell for cell in run.cells if cell.seed == 0)
    return RunCells(run.spec, cells, run.scores, run.resampling)


def test_one_training_determines_neither_order_nor_exponent(quantum_run, tmp_path: Path) -> None:
    run, cells, root = quantum_run
    alone, split = one_seed_of(run), register_split(cells, root / "split.json")

    found = [
        shared_before_specific(alone, split),
        time_by_frequency(alone, write_general(tmp_path)),
    ]

    assert [one.needs for one in found] == ["at least 3 seeds of tell; this run has 1"] * 2
    assert {row["verdict"] for row in judge(found, 0.95)} == {"undetermined"}


def test_one_general_budget_is_not_held_against_the_intercept(tmp_path: Path) -> None:
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [9400]})
    run, cells = write_run(tmp_path, spec, QUANTUM)

    found = shared_before_specific(run, register_split(cells, tmp_path / "split.json"))

    (effect,) = found.components
    assert effect.low < effect.estimate < effect.high


def test_the_exponent_of_learning_time_on_use_is_found(quantum_run, tmp_path: Path) -> None:
    found = time_by_frequency(quantum_run[0], write_general(tmp_path))

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx(0.8, abs=0.15)
    assert row["low"] < 0.8 < row["high"]


def test_without_named_skills_the_exponent_is_undetermined(quantum_run, tmp_path: Path) -> None:
    run = quantum_run[0]

    assert "0" in str(time_by_frequency(run, tmp_path).needs)


def test_arms_with_equal_scores_do_not_support_the_shuffle(quantum_run) -> None:
    (row,) = judge([shuffle_beats_order(quantum_run[0])], 0.95)

    assert row["verdict"] == "undetermined"
    assert row["measure"] == "log_probability: tell minus tell_blocks(4)"


def test_leverage_is_read_at_the_chosen_budgets(quantum_run) -> None:
    row = {"task_budget_tokens": 480, "baseline": "best", "ratio": 3.0, "low": 2.0, "high": 4.0,
           "p_value": 0.001, "censored": "none", "reason": None, "bound": None}  # fmt: skip
    leverage = {
        "primary_metric": "log_probability",
        "metrics": {"log_probability": {"arms": {"tell": {"9400": [row]}}}},
    }

    (judged,) = judge([leverage_above_one(quantum_run[0], leverage)], 0.95)

    assert (judged["verdict"], judged["estimate"], judged["low"]) == ("supported", 3.0, 2.0)


def test_learning_orders_of_seeds_agree_where_groups_differ(quantum_run) -> None:
    orders = learning_orders(quantum_run[0])

    assert orders["within"]["tell"]["spearman"] > 0.5
    assert orders["within"]["tell"]["num_pairs"] == 3
    assert orders["with_tell"]["sft"]["num_pairs"] == 3 * 3
    assert len(orders["units"]) == NUM_TASK
    assert np.isfinite(orders["with_tell"]["sft"]["kendall"])
