"""Scaling of simulated runs: which curves are read, and the finite-K slope where use is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis.run_scaling import measure_scaling
from tests.tell_core.analysis.small_runs import (
    GENERAL_BUDGETS,
    STEPS,
    World,
    by_use,
    labels,
    one_seed_of,
    quantum_world,
    run_spec,
    stepping_tests,
    write_run,
)
from tests.tell_core.analysis.test_use_frequency import write_general


def curves_of(found: dict, **wanted: str) -> list[dict]:
    return [
        row for row in found["curves"] if all(row[name] == value for name, value in wanted.items())
    ]


@pytest.fixture
def scaled(quantum_run, tmp_path: Path) -> dict:
    return measure_scaling(quantum_run[0], write_general(tmp_path))


def test_every_trained_arm_has_a_curve_over_steps_of_task_and_general_items(scaled) -> None:
    found = [(row["arm"], row["role"]) for row in curves_of(scaled, kind="steps")]

    arms = ["sft", "sft_matched", "tell", "tell_blocks(4)", "general_only"]
    assert sorted(found) == sorted((arm, role) for arm in arms for role in ("task", "general"))
    (row,) = curves_of(scaled, kind="steps", arm="tell", role="task")
    assert [point["x"] for point in row["points"]] == [step + 1 for step in STEPS]
    assert row["num_seeds"] == 3


def test_the_loss_over_general_budgets_is_that_of_the_test_items(quantum_run, scaled) -> None:
    (row,) = curves_of(scaled, kind="general_tokens", arm="tell")

    assert [point["x"] for point in row["points"]] == list(GENERAL_BUDGETS)
    point = quantum_run[0].point("log_probability", "tell")
    assert row["points"][-1]["seeds"] == pytest.approx((-point.scores).tolist())
    assert row["points"][-1]["low"] < row["points"][-1]["mean"] < row["points"][-1]["high"]


def test_one_task_budget_is_no_curve(scaled) -> None:
    assert not curves_of(scaled, kind="task_tokens")


def test_a_power_law_in_general_data_is_found(tmp_path: Path) -> None:
    def power(cell, generator):
        seed_noise = 1 + 0.01 * np.random.default_rng([cell.seed, 5]).normal()
        tokens = cell.general_budget_tokens or 1
        return np.full(30, (0.2 + 40 * tokens**-0.6) * seed_noise)

    run, _ = write_run(tmp_path, run_spec(), World(power, quantum_world, by_use))

    (row,) = curves_of(measure_scaling(run, None), kind="general_tokens", arm="tell")

    assert row["status"] == "power law"
    assert row["exponent"] == pytest.approx(0.6, abs=0.02)
    assert row["low"] < 0.6 < row["high"]


def test_the_finite_k_slope_stands_beside_the_measured_one(scaled) -> None:
    rows = {row["arm"]: row for row in scaled["finite_k"]["arms"]}

    assert set(rows) == {"tell", "tell_blocks(4)", "general_only"}  # sft sees no general data
    row = rows["tell"]
    assert row["beta"]["mean"] == pytest.approx(0.8, abs=0.15)
    assert row["num_quanta"] == 7
    assert row["slope"]["mean"] < 0
    assert row["predicted_slope"]["mean"] < 0
    assert row["asymptotic_slope"] is None
    assert "7 skills" in row["asymptotic_reason"]
    points = np.array([(p["measured"], p["predicted"]) for p in row["points"]])
    assert np.log(points[:, 0]).mean() == pytest.approx(np.log(points[:, 1]).mean())


def test_skills_known_before_training_have_no_part_in_the_slope(tmp_path: Path) -> None:
    def first_is_known(cell, generator):
        is_first = np.array(labels()) == "a"
        return np.where(is_first, 0.05, by_use(cell, generator))

    run, _ = write_run(tmp_path, run_spec(), World(stepping_tests, quantum_world, first_is_known))
    slopes = []
    for num_more in (0, 3000):
        (row, *_) = measure_scaling(run, write_general(tmp_path, num_more))["finite_k"]["arms"]
        assert (row["num_quanta"], row["num_known"]) == (6, 1)
        slopes.append(row["predicted_slope"]["mean"])

    assert slopes[1] == pytest.approx(slopes[0])


def test_unknown_use_is_said(quantum_run, tmp_path: Path) -> None:
    run = quantum_run[0]
    unnamed = replace(run, spec=run_spec(analysis={"bootstrap_draws": 400}))

    assert (
        "quantum_column" in measure_scaling(unnamed, write_general(tmp_path))["finite_k"]["reason"]
    )
    assert "names 0 skills" in measure_scaling(run, None)["finite_k"]["reason"]


def test_one_seed_has_no_interval_and_no_claim(quantum_run, tmp_path: Path) -> None:
    found = measure_scaling(one_seed_of(quantum_run[0]), write_general(tmp_path))

    steps = curves_of(found, kind="steps")
    assert {row["num_seeds"] for row in steps} == {1}
    assert "power law" not in {row["status"] for row in steps}
    assert {row["slope"]["low"] for row in found["finite_k"]["arms"]} == {None}


def test_everything_is_json(scaled) -> None:
    json.dumps(scaled, allow_nan=False)
