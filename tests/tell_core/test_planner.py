from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tell_core.analysis.power import Noise, half_width
from tell_core.pipeline import curate_stage
from tell_core.plan import make_plan
from tell_core.planner import designs
from tell_core.spec.cells import plan_cells, tuning_cells
from tell_core.spec.model import ExperimentSpec
from tests.fixtures.tiny import tiny_fields

ARMS = ["base", "sft", "sft_matched", "tell", "tell_no_anchor", "general_only"]


@pytest.fixture(scope="module")
def parts(tiny_world: Path, tmp_path_factory):
    fields = tiny_fields(tiny_world) | {"arms": ARMS, "seeds": [0, 1, 2, 3]}
    fields["budgets"] = {"task_tokens": [100, 200, 250, 800], "general_tokens": [400, 800]}
    spec = ExperimentSpec.model_validate(fields)
    plan = make_plan(spec, curate_stage(spec, tmp_path_factory.mktemp("run")))
    return spec, plan, designs(spec, plan)


def test_the_first_part_is_the_whole(parts):
    spec, plan, found = parts

    assert plan_cells(found[0].spec) == plan_cells(spec)
    assert found[0].left_out == ()
    assert found[0].hours == pytest.approx(plan.wall_seconds / 3600)


def test_each_part_lies_within_the_one_before_and_costs_less(parts):
    _, _, found = parts

    for larger, smaller in pairwise(found):
        assert set(plan_cells(smaller.spec)) < set(plan_cells(larger.spec))
        assert smaller.num_cells == len(plan_cells(smaller.spec))
        assert smaller.hours < larger.hours
        assert smaller.left_out[:-1] == larger.left_out
        assert set(tuning_cells(smaller.spec)) <= set(tuning_cells(larger.spec))


def test_controls_go_before_seeds_before_budgets_and_two_seeds_stay(parts):
    _, _, found = parts

    assert found[-1].left_out == (
        "arm tell_no_anchor", "arm general_only", "seed 3", "general budget 400",
        "task budget 200", "seed 2",
    )  # fmt: skip
    assert found[-1].spec.seeds == (0, 1)
    assert found[-1].spec.budgets.task_tokens == (100, 250, 800)


def test_half_widths_are_in_seed_sds_until_a_run_has_measured_the_noise(parts):
    spec, plan, found = parts
    num_items = plan.power[spec.analysis.primary_metric]["num_items"]
    noise = Noise(seed_sd=0.2, item_difference_sd=3.0)

    measured = designs(spec, replace(plan, noise=noise))

    seeds = [len(part.spec.seeds) for part in found]
    assert [part.half_width for part in found] == [
        half_width(Noise(1.0, 0.0), count, num_items, 0.95) for count in seeds
    ]
    assert [part.half_width for part in measured] == [
        half_width(noise, count, num_items, 0.95) for count in seeds
    ]
