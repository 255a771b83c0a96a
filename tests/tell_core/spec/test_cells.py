import re

from hypothesis import given
from hypothesis import strategies as st

from tell_core.spec.arms import ARM_NAMES, parse_arm
from tell_core.spec.cells import Cell, plan_cells, short_count, tuning_cells
from tell_core.spec.model import ExperimentSpec

arm_names = st.sampled_from([*ARM_NAMES[:-1], "tell_blocks(4)"])


def make_spec(**changes) -> ExperimentSpec:
    fields = {
        "name": "tiny",
        "model": {"id": "base"},
        "task": {"name": "t", "train": "a.jsonl", "test": "b.jsonl"},
        "general": ["g.jsonl"],
        "budgets": {"task_tokens": [100, 200, 400], "general_tokens": [1000, 2000]},
        "seeds": [0, 1],
    }
    return ExperimentSpec.model_validate(fields | changes)


@given(st.sets(arm_names))
def test_cell_names_are_unique_and_safe_as_file_names(arms):
    names = [cell.name for cell in plan_cells(make_spec(arms=sorted(arms | {"tell"})))]

    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)


@given(arm_names)
def test_an_arm_has_just_the_axes_it_uses(name):
    arm = parse_arm(name)
    every = plan_cells(make_spec(arms=sorted({name, "tell"})))
    cells = [cell for cell in every if cell.arm == name]

    num_task = 3 if arm.uses_task else 1
    num_general = 2 if arm.uses_general or arm.matches_steps else 1
    num_seeds = 2 if arm.is_trained or arm.has_shots else 1
    assert len(cells) == num_task * num_general * num_seeds


def test_every_trained_arm_is_tuned_at_the_same_budget_and_seed():
    spec = make_spec(training={"learning_rate": [1e-3, 1e-2]}, arms=["base", "sft", "tell"])

    assert tuning_cells(spec) == (Cell("sft", 200, None, 1000), Cell("tell", 200, 2000, 1000))


def test_one_learning_rate_needs_no_tuning():
    assert tuning_cells(make_spec()) == ()


def test_counts_are_short_for_people():
    assert [short_count(n) for n in (950, 8000, 2500, 1_200_000)] == ["950", "8k", "2.5k", "1.2M"]
