"""The Q sequence of a run."""

from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis.learning_orders import learning_orders
from tell_core.analysis.registration import register_split
from tests.tell_core.analysis.small_runs import (
    NUM_TASK,
    World,
    by_use,
    quantum_world,
    run_spec,
    stepping_tests,
    write_run,
)


def test_learning_orders_of_seeds_agree_where_groups_differ(quantum_run) -> None:
    orders = learning_orders(quantum_run[0])

    tell, with_sft = orders["within_arm"]["tell"], orders["with_tell"]["sft"]
    assert tell["spearman"] > 0.5
    assert tell["kendall_low"] <= tell["kendall"] <= tell["kendall_high"]
    assert (tell["num_pairs"], with_sft["num_pairs"]) == (3, 3 * 3)
    assert len(orders["units"]) == tell["num_units"] == NUM_TASK
    assert np.isfinite(with_sft["kendall"])
    assert "tell" not in orders["with_tell"]
    assert orders["groups"] is None


def test_units_have_their_group_and_are_learned_at_the_step_they_were_made_for(
    quantum_run,
) -> None:
    run, cells, root = quantum_run

    orders = learning_orders(run, register_split(cells, root / "split.json"))

    shared = orders["arms"]["tell"]["order"][0]
    specific = orders["arms"]["tell"]["order"][-1]
    assert (orders["groups"][0], orders["groups"][-1]) == ("shared", "specific")
    assert shared["step"] + 1 == pytest.approx(np.exp(6.5 - 0.5 * np.log(9400)), rel=0.5)
    assert specific["step"] + 1 == pytest.approx(np.exp(4.0), rel=0.5)
    assert shared["step_low"] < shared["step"] < shared["step_high"]
    assert shared["rank"] < specific["rank"]


def test_what_sft_never_learns_is_censored_at_its_last_step(quantum_run) -> None:
    sft = learning_orders(quantum_run[0])["arms"]["sft"]

    never = sft["order"][0]
    assert never["learned_share"] == 0
    assert never["step"] == pytest.approx(sft["last_step"])
    assert never["step_high"] is None


def test_what_is_learned_and_lost_again_is_counted(tmp_path: Path) -> None:
    def forgetting(cell, generator):
        losses = quantum_world(cell, generator)
        losses[-1, : NUM_TASK // 4] = 1.9  # of 2 nats
        return losses

    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [9400]})
    run, _ = write_run(tmp_path, spec, World(stepping_tests, forgetting, by_use))

    arms = learning_orders(run)["arms"]

    assert arms["tell"]["lost_share"] == pytest.approx(1 / 4)


def test_what_stays_learned_is_not_lost(quantum_run) -> None:
    arms = learning_orders(quantum_run[0])["arms"]

    assert {entry["lost_share"] for entry in arms.values()} == {0}
