import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.budgets import (
    select_from_sources,
    select_within_budget,
    source_shares,
    split_budget,
    stratified_order,
)
from tell_core.data.orders import build_order
from tell_core.errors import TokenBudgetError

counts_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60)
seeds = st.integers(-3, 10)


@given(counts_lists, st.integers(50, 2000), st.integers(0, 1000), seeds)
def test_smaller_budget_selects_a_prefix_of_larger(counts, budget, more, seed):
    array = np.asarray(counts)

    small = select_within_budget(array, budget, seed)
    large = select_within_budget(array, budget + more, seed)

    assert small.tolist() == large[: len(small)].tolist()


@given(counts_lists, st.integers(50, 2000), seeds)
def test_selection_is_whole_distinct_and_never_over_budget(counts, budget, seed):
    array = np.asarray(counts)

    chosen = select_within_budget(array, budget, seed)

    assert len(set(chosen.tolist())) == len(chosen) >= 1
    assert array[chosen].sum() <= budget


@given(counts_lists, seeds)
def test_budget_beyond_the_pool_takes_every_example_once(counts, seed):
    chosen = select_within_budget(np.asarray(counts), sum(counts) + 1, seed)

    assert sorted(chosen.tolist()) == list(range(len(counts)))


@given(counts_lists, st.integers(50, 2000), seeds)
def test_selection_stops_at_the_first_example_that_would_exceed(counts, budget, seed):
    array = np.asarray(counts)
    order = select_within_budget(array, int(array.sum()), seed)

    chosen = select_within_budget(array, budget, seed)

    if len(chosen) < len(order):
        assert array[order[: len(chosen) + 1]].sum() > budget


def test_budget_smaller_than_the_first_example_is_an_error_with_its_size():
    with pytest.raises(TokenBudgetError, match=r"10 tokens.*has 25 tokens"):
        select_within_budget(np.asarray([25]), 10, seed=0)


sources = st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 500)), min_size=1, max_size=5)


@given(sources, st.integers(1, 3000), st.integers(0, 500))
def test_shares_of_a_larger_budget_are_never_smaller(sources, budget, more):
    weights, available = zip(*sources, strict=True)

    small = split_budget(budget, weights, available)
    large = split_budget(budget + more, weights, available)

    assert all(a <= b for a, b in zip(small, large, strict=True))


@given(sources, st.integers(1, 3000))
def test_shares_use_the_budget_up_to_rounding_or_the_pool(sources, budget):
    weights, available = zip(*sources, strict=True)

    shares = split_budget(budget, weights, available)

    assert all(share <= most for share, most in zip(shares, available, strict=True))
    assert min(budget, sum(available)) - len(sources) < sum(shares) <= budget


def test_budget_is_split_by_weight():
    assert split_budget(400, [3.0, 1.0], [1000, 1000]) == [300, 100]


def test_what_one_source_lacks_goes_to_the_others():
    assert split_budget(400, [1.0, 1.0, 2.0], [10, 1000, 1000]) == [10, 130, 260]


@given(st.lists(st.integers(1, 9), min_size=20, max_size=40), st.integers(40, 200), seeds)
def test_choice_over_sources_is_nested_source_by_source(counts, budget, seed):
    array, names = np.asarray(counts), ["ab"[row % 2] for row in range(len(counts))]
    weights = {"a": 2.0, "b": 1.0}

    small = select_from_sources(array, names, weights, budget, seed)
    large = select_from_sources(array, names, weights, budget + 30, seed)

    assert set(small.tolist()) <= set(large.tolist())
    assert array[large].sum() <= budget + 30


def test_general_budget_that_holds_nothing_is_an_error():
    with pytest.raises(TokenBudgetError, match="general budget of 3 tokens holds no example"):
        select_from_sources(np.asarray([9, 9]), ["a", "b"], {"a": 1.0, "b": 1.0}, 3, seed=0)


source_pools = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=12, max_size=80
)
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.5, "absent": 2.0}


@given(source_pools, st.integers(60, 900), st.integers(0, 300), seeds)
def test_sources_are_nested_and_within_one_example_of_their_share(pool, budget, more, seed):
    names, counts = np.asarray([name for name, _ in pool]), np.asarray([n for _, n in pool])

    small, large = (
        select_from_sources(counts, names, WEIGHTS, total, seed).tolist()
        for total in (budget, budget + more)
    )
    everything = select_from_sources(counts, names, WEIGHTS, int(counts.sum()) * 20, seed)

    shares = source_shares(counts, names, WEIGHTS, budget)
    assert set(shares) == set(names.tolist())
    assert sum(shares.values()) <= budget
    for name, share in shares.items():
        of_small, of_large, order = (
            [row for row in rows if names[row] == name]
            for rows in (small, large, everything.tolist())
        )
        assert of_small == of_large[: len(of_small)] == order[: len(of_small)]
        used = int(counts[of_small].sum())
        assert used <= share
        if len(of_small) < len(order):
            assert used + counts[order[len(of_small)]] > share


strata_lists = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=120)


@given(strata_lists, seeds)
def test_every_beginning_of_a_stratified_order_is_in_proportion_to_within_one_example(strata, seed):
    names = np.asarray(strata)

    order = stratified_order(names, seed)

    assert sorted(order.tolist()) == list(range(len(names)))
    for name in set(strata):
        share = (names == name).mean()
        taken = np.cumsum(names[order] == name)
        assert np.abs(taken - share * np.arange(1, len(names) + 1)).max() < 1 + 1e-9


@given(strata_lists, st.data(), st.integers(50, 600), st.integers(0, 300), seeds)
def test_stratified_budgets_are_nested_and_never_over(strata, data, budget, more, seed):
    some = st.lists(st.integers(1, 50), min_size=len(strata), max_size=len(strata))
    counts = np.asarray(data.draw(some))
    order = stratified_order(strata, seed)

    small, large = (
        select_within_budget(counts, total, seed, order=order) for total in (budget, budget + more)
    )

    assert small.tolist() == large[: len(small)].tolist()
    assert counts[small].sum() <= budget


def test_a_stratified_order_depends_on_the_seed():
    strata = ["a", "b"] * 20

    assert stratified_order(strata, 0).tolist() != stratified_order(strata, 1).tolist()


@given(source_pools, st.integers(60, 900), seeds, st.integers(1, 3))
def test_a_mixture_meets_each_chosen_example_exactly_once_per_epoch(pool, budget, seed, epochs):
    names, counts = np.asarray([name for name, _ in pool]), np.asarray([n for _, n in pool])
    task = select_within_budget(counts, budget, seed)
    general = select_from_sources(counts, names, WEIGHTS, budget, seed)

    order = build_order("shuffle", len(task), len(general), epochs, seed)

    num_examples = len(task) + len(general)
    assert len(set(general.tolist())) == len(general)
    for epoch in order.reshape(epochs, num_examples):
        assert sorted(epoch.tolist()) == list(range(num_examples))
