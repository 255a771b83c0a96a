import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.emergence import (
    MIN_POINTS,
    VERDICTS,
    emergence_of_cell,
    emergence_summary,
    item_verdicts,
    shape_verdicts,
)
from tell_core.analysis.simulated_curves import RIGHT, Kind, simulated_curves, spaced_steps

STEPS = spaced_steps(16)


@given(st.floats(0.1, 10), st.floats(-2, 5), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_verdicts_do_not_depend_on_the_unit_or_origin_of_the_loss(
    unit: float, origin: float, seed: int
) -> None:
    losses = np.concatenate(
        [
            simulated_curves(kind, STEPS, 3, 0.05, seed)
            for kind in ("flat", "line", "power", "step")
        ],
        axis=1,
    )

    plain = item_verdicts(STEPS, losses)
    moved = item_verdicts(STEPS, unit * losses + origin)

    assert [one.verdict for one in moved] == [one.verdict for one in plain]


@given(st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_verdict_does_not_depend_on_the_items_beside_it(seed: int) -> None:
    losses = simulated_curves("step", STEPS, 4, 0.1, seed)

    together = item_verdicts(STEPS, losses)

    alone = [item_verdicts(STEPS, losses[:, [column]])[0] for column in range(4)]
    assert [one.verdict for one in alone] == [one.verdict for one in together]


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [("step", 0.95), ("power", 0.85), ("line", 0.85), ("flat", 0.80), ("rise", 0.85)],
)
@pytest.mark.parametrize("noise", [0.02, 0.05, 0.15])
def test_sixteen_points_tell_the_shapes_apart(kind: Kind, accepted: float, noise: float) -> None:
    verdicts = item_verdicts(STEPS, simulated_curves(kind, STEPS, 200, noise, seed=0))

    assert np.mean([one.verdict == RIGHT[kind] for one in verdicts]) >= accepted


@pytest.mark.parametrize("kind", ["flat", "line", "power"])
def test_false_steps_are_rare(kind: Kind) -> None:
    verdicts = item_verdicts(STEPS, simulated_curves(kind, STEPS, 400, 0.15, seed=1))

    assert np.mean([one.verdict == "step" for one in verdicts]) <= 0.02


def test_a_step_is_found_where_it_is() -> None:
    middle = np.log1p(40.0)
    losses = 2 / (1 + np.exp(4 * (np.log1p(STEPS) - middle)))

    (found,) = item_verdicts(STEPS, losses[:, None])

    assert found.verdict == "step"
    assert found.midpoint_step == pytest.approx(40, rel=0.02)
    assert found.sharpness == pytest.approx(4, rel=0.05)
    assert found.drop == pytest.approx(2, rel=0.01)


def test_a_loss_that_falls_and_rises_again_is_undetermined() -> None:
    verdicts = item_verdicts(STEPS, simulated_curves("turn", STEPS, 50, 0.05, seed=0))

    assert {one.verdict for one in verdicts} == {"undetermined"}
    assert all("turns round" in str(one.reason) for one in verdicts)


def test_changes_below_a_thousandth_of_a_nat_are_flat() -> None:
    losses = 0.001 * simulated_curves("step", STEPS, 20, 0.0, seed=0) / 10

    assert {one.verdict for one in item_verdicts(STEPS, losses)} == {"flat"}


def test_too_few_points_are_undetermined_with_the_reason() -> None:
    steps = spaced_steps(MIN_POINTS)[1:]

    (found,) = item_verdicts(steps, simulated_curves("step", steps, 1, 0.0, seed=0))

    assert found.verdict == "undetermined"
    assert f"at least {MIN_POINTS}" in str(found.reason)


def test_an_item_with_a_missing_loss_leaves_the_others_alone() -> None:
    losses = simulated_curves("step", STEPS, 3, 0.05, seed=0)
    losses[4, 1] = np.nan

    found = item_verdicts(STEPS, losses)

    assert [one.verdict for one in found] == ["step", "undetermined", "step"]
    assert "not a finite number" in str(found[1].reason)


def test_entries_of_a_cell_can_be_written_as_json() -> None:
    losses = simulated_curves("step", STEPS, 2, 0.05, seed=0)
    losses[0, 1] = np.inf

    entry = emergence_of_cell(STEPS.astype(int), losses, ["a", "b"], ["task", "general"])

    json.dumps(entry, allow_nan=False)
    assert entry["items"][1]["losses"][0] is None
    assert entry["counts"] == dict.fromkeys(VERDICTS, 0) | {"step": 1, "undetermined": 1}


def test_shares_are_given_by_arm_and_role() -> None:
    steps = STEPS.astype(int)
    losses = np.concatenate(
        [
            simulated_curves("step", STEPS, 2, 0.02, seed=0),
            simulated_curves("flat", STEPS, 2, 0.0, seed=0),
        ],
        axis=1,
    )
    roles = ["task", "task", "general", "general"]
    cell = emergence_of_cell(steps, losses, list("abcd"), roles)

    summary = emergence_summary([("tell", cell), ("tell", cell), ("sft", cell)])

    assert summary["tell"]["num_cells"] == 2
    assert summary["tell"]["task"]["shares"]["step"] == 1.0
    assert summary["sft"]["general"]["counts"]["flat"] == 2
    assert summary["sft"]["general"]["median_midpoint_step"] is None


def test_sixty_cells_of_sixty_four_items_take_less_than_half_a_minute() -> None:
    losses = simulated_curves("power", STEPS, 64, 0.05, seed=0)
    started = time.perf_counter()

    for _ in range(6):
        item_verdicts(STEPS, losses)

    assert time.perf_counter() - started < 3


def test_the_guard_lets_clear_steps_pass() -> None:
    verdicts = item_verdicts(STEPS, simulated_curves("step", STEPS, 100, 0.05, seed=0))

    assert np.mean([one.is_emergent for one in verdicts]) >= 0.9


@pytest.mark.parametrize("kind", ["line", "power", "flat"])
def test_the_guard_stops_most_of_the_false_steps(kind: Kind) -> None:
    verdicts = item_verdicts(STEPS, simulated_curves(kind, STEPS, 1000, 0.15, seed=1))

    claimed = np.mean([one.is_emergent for one in verdicts])
    assert claimed <= 0.01
    assert claimed <= np.mean([one.verdict == "step" for one in verdicts])


def test_the_guard_is_for_steps_alone() -> None:
    verdicts = item_verdicts(STEPS, simulated_curves("power", STEPS, 20, 0.02, seed=0))

    assert {one.guard_share for one in verdicts if one.verdict != "step"} == {None}


def test_seeds_side_by_side_make_steps_out_of_eight_scales() -> None:
    """Eight points alone cannot show a step; three seeds at each of them can."""
    scales = np.log(np.geomspace(200, 9400, 8))
    generator = np.random.default_rng(0)
    middles = generator.uniform(scales[2], scales[5], 100)
    one_seed = 2 / (1 + np.exp(4 * (scales[:, None] - middles)))
    noisy = [one_seed + generator.normal(0, 0.1, one_seed.shape) for _ in range(3)]

    alone = shape_verdicts(scales, noisy[0])
    together = shape_verdicts(np.repeat(scales, 3), np.stack(noisy, axis=1).reshape(24, 100))

    assert np.mean([one.is_emergent for one in alone]) < 0.5
    assert np.mean([one.is_emergent for one in together]) > 0.8


def test_an_entry_says_when_an_item_was_learned() -> None:
    losses = np.concatenate(
        [simulated_curves(kind, STEPS, 1, 0.0, seed=0) for kind in ("step", "flat")], axis=1
    )

    step, flat = emergence_of_cell(STEPS.astype(int), losses, ["a", "b"], ["task"] * 2)["items"]

    assert step["is_learned"] and 0 < step["learning_step"] < STEPS[-1]
    assert not flat["is_learned"] and flat["learning_step"] == pytest.approx(STEPS[-1])


def test_falling_items_are_monogenic_or_polygenic() -> None:
    losses = np.concatenate(
        [simulated_curves(kind, STEPS, 3, 0.02, seed=0) for kind in ("step", "power", "flat")],
        axis=1,
    )
    cell = emergence_of_cell(STEPS.astype(int), losses, list("abcdefghi"), ["task"] * 9)

    summary = emergence_summary([("tell", cell)])["tell"]["task"]

    assert summary["monogenic_share"] == summary["polygenic_share"] == 0.5


def test_the_summary_of_an_arm_leaves_no_role_out() -> None:
    losses = simulated_curves("flat", STEPS, 3, 0.02, seed=0)
    roles = ["task", "general", "retention"]
    cell = emergence_of_cell(STEPS.astype(int), losses, list("abc"), roles)

    summary = emergence_summary([("tell", cell)])["tell"]

    assert {role: summary[role]["num_curves"] for role in roles} == dict.fromkeys(roles, 1)
