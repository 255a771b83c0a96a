"""P1: steps in the amount of general data."""

from pathlib import Path

import numpy as np
import pytest

from tell_core.analysis import data_steps
from tell_core.analysis.data_steps import (
    ItemCurves,
    emergence_with_data,
    step_excess,
    step_surplus,
)
from tell_core.analysis.emergence import shape_verdicts
from tell_core.analysis.resampling import Resampling
from tell_core.analysis.verdicts import judge
from tests.tell_core.analysis.small_runs import (
    GENERAL_BUDGETS,
    QUANTUM,
    World,
    by_use,
    quantum_world,
    run_spec,
    smooth_tests,
    write_run,
)

NUM_SEEDS, NUM_ITEMS = 3, 12
SCALE = np.repeat(np.log(GENERAL_BUDGETS), NUM_SEEDS)
SEEDS = np.tile(np.arange(NUM_SEEDS), len(GENERAL_BUDGETS))


def test_steps_in_the_amount_of_general_data_are_emergence(quantum_run) -> None:
    found = emergence_with_data(quantum_run[0])

    (row,) = judge([found], 0.95)
    assert row["verdict"] == "supported"
    assert row["estimate"] > 0.8
    assert found.p_value is not None
    assert 7 * found.p_value <= 0.05  # a clear step stands among seven predictions too


def test_where_smooth_curves_do_as_well_few_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    draw = data_steps._smooth_shares

    def counted(curves):
        for number, share in enumerate(draw(curves), start=1):
            sizes.append(number)
            yield share

    monkeypatch.setattr(data_steps, "_smooth_shares", counted)
    flat = falls(np.random.default_rng(0), by_seed=0.0)
    flat = flat._replace(losses=np.random.default_rng(0).normal(1, 0.1, flat.losses.shape))

    part = step_surplus(flat, shape_verdicts(flat.scale, flat.losses), 0.95)

    assert part.p_value > 0.2
    assert max(sizes) == 99


def test_smooth_falls_are_no_emergence(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, run_spec(), World(smooth_tests, quantum_world, by_use))

    (row,) = judge([emergence_with_data(run)], 0.95)

    assert row["verdict"] != "supported"


def test_emergence_with_few_budgets_says_how_many_it_needs(tmp_path: Path) -> None:
    spec = run_spec(budgets={"task_tokens": [480], "general_tokens": [200, 600, 9400]})
    run, _ = write_run(tmp_path, spec, QUANTUM)

    assert emergence_with_data(run).needs == ("at least 8 general budgets for tell; this run has 3")


def falls(generator: np.random.Generator, *, by_seed: float) -> ItemCurves:
    """Items of an arm that fall around 1,300 tokens, as sharply as the seed has it."""
    sharpness = np.exp(generator.normal(np.log(2.5), by_seed, NUM_SEEDS))[SEEDS][:, None]
    middles = np.log(1300) + np.linspace(-0.5, 0.5, NUM_ITEMS)
    losses = 0.2 + 1.8 / (1 + np.exp(sharpness * (SCALE[:, None] - middles)))
    noise = generator.normal(0, 0.1, losses.shape)
    return ItemCurves(SCALE, SEEDS, losses + noise, tuple(f"test-{n}" for n in range(NUM_ITEMS)))


@pytest.mark.slow
def test_arms_that_differ_by_their_seeds_alone_are_seldom_told_apart() -> None:
    generator, resampling = np.random.default_rng(1), Resampling(num_draws=500)

    p_values = [
        step_excess(
            falls(generator, by_seed=0.5), falls(generator, by_seed=0.5), resampling
        ).p_value
        for _ in range(40)
    ]

    assert np.mean(np.array(p_values) < 0.05) <= 0.15  # with items alone it is 0.4


def test_what_one_seed_alone_shows_is_no_excess() -> None:
    generator = np.random.default_rng(0)
    tell, matched = falls(generator, by_seed=0.0), falls(generator, by_seed=0.0)
    flat = matched._replace(losses=1 + generator.normal(0, 0.05, matched.losses.shape))
    one_late = np.where((SEEDS == 0)[:, None], flat.losses, tell.losses)

    alike = step_excess(sharp(tell), flat, Resampling())
    uneven = step_excess(tell._replace(losses=one_late), flat, Resampling())

    assert alike.p_value < 0.05 < uneven.p_value


def sharp(curves: ItemCurves) -> ItemCurves:
    """The same items, falling so sharply that every seed shows it."""
    middles = np.log(1300) + np.linspace(-0.5, 0.5, NUM_ITEMS)
    losses = 0.2 + 1.8 / (1 + np.exp(5 * (SCALE[:, None] - middles)))
    noise = np.random.default_rng(1).normal(0, 0.05, losses.shape)
    return curves._replace(losses=losses + noise)
