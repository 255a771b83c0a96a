from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.adaptive import Contender, Finding, contest, left_out, next_round
from tell_core.errors import SpecError
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.model import ExperimentSpec

BUDGETS = (100, 200, 400, 800, 1600)
Score = Callable[[Cell], float]


def make_spec(**changes) -> ExperimentSpec:
    fields = {
        "name": "race",
        "model": {"id": "none"},
        "task": {"name": "none", "train": "none", "test": "none"},
        "general": ["none"],
        "budgets": {"task_tokens": BUDGETS, "general_tokens": [5000]},
        "arms": ["base", "sft", "sft_matched", "tell", "general_only"],
        "seeds": [0, 1, 2],
    }
    return ExperimentSpec.model_validate(fields | changes)


def run(spec: ExperimentSpec, score: Score, shown_above: Callable[[int], bool]) -> list[Cell]:
    """All cells that an adaptive run asks for, in order; intervals exclude 1 where told so."""
    contested = contest(spec)
    finished: dict[Cell, float] = {}

    def judge(one: Contender, budget: int):
        here = (one.arm, budget)
        seeds = {c.seed for c in finished if (c.arm, c.task_budget_tokens) == here}
        assert seeds == set(spec.seeds), "a budget is judged with all seeds"
        return Finding(1.5 if shown_above(budget) else 0.5, half_width=0.1)

    while step := next_round(contested, finished, judge):
        assert step.cells, "a round has cells"
        assert not set(step.cells) & set(finished), "nothing is run twice"
        finished |= {cell: score(cell) for cell in step.cells}
    return list(finished)


CAUTION = {3: 2.11694, 4: 1.72759, 5: 1.55758}  # sqrt((n - 1) / 20th percentile of chi2(n - 1))


@given(widths=st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5), target=st.floats(0.01, 2.0))
@settings(max_examples=50, deadline=None)
def test_seeds_come_one_by_one_until_the_interval_is_narrow(widths: list[float], target: float):
    """``widths[k]``: half the interval with k + 1 seeds; with one there is none."""
    spec = make_spec(seeds=[0, 1, 2, 3, 4], analysis={"target_half_width": target})
    finished: dict[Cell, float] = {}

    def judge(one: Contender, budget: int):
        seeds = {c.seed for c in finished if (c.arm, c.task_budget_tokens) == (one.arm, budget)}
        return Finding(1.5, widths[len(seeds) - 1] if len(seeds) > 1 else None)

    while step := next_round(contest(spec), finished, judge):
        finished |= {cell: falling(800)(cell) for cell in step.cells}

    confirmed = {cell.seed for cell in finished if cell.arm == "tell" and cell.seed}
    needed = next((k for k in (3, 4, 5) if widths[k - 1] * CAUTION[k] <= target), 5)
    assert confirmed == set(range(1, needed))


def falling(ends_at: int) -> Score:
    """TELL is better below a budget and worse from there on."""

    def score(cell: Cell) -> float:
        budget = cell.task_budget_tokens or 0
        gain = 0.1 if budget < ends_at else -0.1
        return budget / 1e4 + (gain if cell.arm == "tell" else 0.0)

    return score


@given(ends_at=st.sampled_from([0, *BUDGETS, 3200]))
@settings(max_examples=20, deadline=None)
def test_the_largest_budget_won_is_confirmed_with_every_seed_needed(ends_at: int):
    spec = make_spec()

    cells = run(spec, falling(ends_at), shown_above=lambda budget: budget < ends_at)

    won = [budget for budget in BUDGETS if budget < ends_at]
    confirmed = won[-1] if won else BUDGETS[0]
    assert Cell("tell", confirmed, 5000, 1) in cells
    assert set(cells) <= set(plan_cells(spec))


def test_fewer_cells_are_run_than_the_grid_has_and_the_rest_is_listed():
    spec = make_spec()

    cells = run(spec, falling(800), shown_above=lambda budget: budget < 800)

    grid = plan_cells(spec)
    assert len(cells) < len(grid) / 2
    assert sorted(left_out(spec, cells)) == sorted(set(grid) - set(cells))


def test_a_budget_is_judged_once_with_all_its_seeds():
    spec, judged = make_spec(), []

    def shown(budget: int) -> bool:
        judged.append(budget)
        return budget == 200

    cells = run(spec, falling(800), shown)

    seeds = {cell.seed for cell in cells if (cell.arm, cell.task_budget_tokens) == ("tell", 400)}
    assert seeds == set(spec.seeds)
    assert list(dict.fromkeys(judged)) == [400, 200]


def test_without_success_the_next_smaller_budget_is_tried():
    cells = run(make_spec(), falling(800), shown_above=lambda budget: budget == 200)

    at_200 = {cell.seed for cell in cells if (cell.arm, cell.task_budget_tokens) == ("tell", 200)}
    at_100 = {cell.seed for cell in cells if (cell.arm, cell.task_budget_tokens) == ("tell", 100)}
    assert at_200 == {0, 1, 2}
    assert not at_100


def test_the_worse_half_of_the_contenders_is_dropped_after_one_seed():
    arms = ["sft", "tell", "tell_no_anchor", "tell_random_anchor", "tell_task_last"]
    quality = dict(zip(arms, (0.0, 0.4, 0.3, 0.2, 0.1), strict=True))

    cells = run(make_spec(arms=arms), lambda cell: quality[cell.arm], lambda budget: False)

    seeds = {arm: {cell.seed for cell in cells if cell.arm == arm} for arm in arms}
    assert seeds["tell"] == {0, 1, 2}
    assert seeds["tell_task_last"] == seeds["tell_random_anchor"] == {0}


def test_one_seed_confirms_nothing_and_ends():
    cells = run(make_spec(seeds=[7]), falling(800), shown_above=lambda budget: True)

    assert {cell.seed for cell in cells} == {7}


@pytest.mark.parametrize("arms", [["base", "sft"], ["tell", "general_only"]])
def test_without_both_sides_there_is_no_contest(arms):
    with pytest.raises(SpecError, match="compares arm `tell` with `sft`"):
        contest(make_spec(arms=arms))
