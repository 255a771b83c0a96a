from itertools import pairwise
from pathlib import Path

import pytest

from tell_core.pipeline import curate_stage
from tell_core.plan import make_plan
from tell_core.planner import designs, half_width
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


def test_more_seeds_narrow_the_interval_and_one_gives_none():
    widths = [half_width(num_seeds, 0.95) for num_seeds in (2, 3, 5, 10)]

    assert half_width(1, 0.95) is None
    assert widths == sorted(widths, reverse=True)
    assert widths[1] == pytest.approx(3.513, abs=1e-3)  # t(2) = 4.303, times sqrt(2 / 3)
