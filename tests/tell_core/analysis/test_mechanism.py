import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tell_core.analysis.mechanism import (
    emergence_with_data,
    learning_orders,
    leverage_above_one,
    shared_before_specific,
    shuffle_beats_order,
    time_by_frequency,
)
from tell_core.analysis.registration import register_split
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
    assert len(orders["units"]) == NUM_TASK
    assert np.isfinite(orders["with_tell"]["sft"]["kendall"])
