import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.orders import (
    build_order,
    num_passes,
    order_digest,
    repeated_order,
    repeated_visits,
    shuffle_proof,
)

sizes = st.integers(0, 30)
kinds = st.sampled_from(["shuffle", "task_first", "task_last", "blocks"])


@given(kinds, st.integers(1, 30), sizes, st.integers(1, 4), st.integers(-2, 5))
def test_every_example_comes_exactly_once_per_epoch(kind, num_task, num_general, epochs, seed):
    order = build_order(kind, num_task, num_general, epochs, seed, num_blocks=3)

    assert order.dtype == np.int32
    for epoch in order.reshape(epochs, -1):
        assert sorted(epoch.tolist()) == list(range(num_task + num_general))


@given(kinds, st.integers(1, 20), sizes, st.integers(0, 5))
def test_equal_inputs_give_equal_digests_and_more_epochs_change_none_before(kind, task, gen, seed):
    short = build_order(kind, task, gen, 2, seed, num_blocks=2)
    long = build_order(kind, task, gen, 3, seed, num_blocks=2)

    assert order_digest(short) == order_digest(long[: len(short)])


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [build_order("shuffle", 20, 20, 2, seed) for seed in (0, 1)]

    assert len({order_digest(epoch) for order in orders for epoch in np.split(order, 2)}) == 4


@given(st.integers(1, 10), st.integers(1, 20), st.integers(0, 3))
def test_ordered_kinds_put_task_data_where_they_say(num_task, num_general, seed):
    first = build_order("task_first", num_task, num_general, 1, seed)
    last = build_order("task_last", num_task, num_general, 1, seed)

    assert set(first[:num_task].tolist()) == set(range(num_task))
    assert set(last[num_general:].tolist()) == set(range(num_task))


def test_blocks_alternate_general_and_task_parts():
    order = build_order("blocks", 6, 12, 1, seed=0, num_blocks=3)

    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(order < 6)]
    assert runs == [(False, 4), (True, 2)] * 3


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 3))
def test_repeated_order_has_the_length_asked_for_and_fresh_epochs(num_task, positions, seed):
    order = repeated_order(num_task, positions, seed)

    assert len(order) == positions
    for start in range(0, positions - num_task + 1, num_task):
        assert sorted(order[start : start + num_task].tolist()) == list(range(num_task))


def test_shuffle_proof_counts_gaps_windows_and_runs():
    is_task = np.asarray([True] * 2 + [False] * 4)

    proof = shuffle_proof(np.asarray([2, 0, 3, 4, 5, 1], dtype=np.int32), is_task)

    assert proof["largest_gap"] == 3
    assert proof["mean_gap"] == pytest.approx(4 / 3)
    assert proof["window"] == 1
    assert proof["task_share_per_window"] == [0, 1, 0, 0, 0, 1]
    assert proof["runs"] == 4
    assert proof["expected_runs"] == pytest.approx(1 + 2 * 2 * 4 / 6)


def _two_sided_by_counting(num_a, num_b, runs):
    """P-value of a number of runs by listing all arrangements."""
    counts = []
    for places in itertools.combinations(range(num_a + num_b), num_a):
        marks = [at in places for at in range(num_a + num_b)]
        counts.append(1 + sum(a != b for a, b in itertools.pairwise(marks)))
    total = len(counts)
    low = sum(count <= runs for count in counts) / total
    high = sum(count >= runs for count in counts) / total
    return min(1.0, 2 * min(low, high))


@given(st.lists(st.booleans(), min_size=2, max_size=9).filter(lambda m: 0 < sum(m) < len(m)))
def test_runs_p_value_is_exact(marks):
    proof = shuffle_proof(np.arange(len(marks)), np.asarray(marks))

    expected = _two_sided_by_counting(sum(marks), len(marks) - sum(marks), proof["runs"])
    assert proof["runs_p_value"] == pytest.approx(expected)


def test_a_few_task_examples_in_much_general_data_pass_as_shuffled():
    p_values = []
    for seed in range(200):
        order = build_order("shuffle", 10, 1000, 1, seed)
        p_values.append(shuffle_proof(order, np.arange(1010) < 10)["runs_p_value"])

    assert np.mean(np.asarray(p_values) < 0.05) <= 0.05


def test_ordered_data_fail_the_runs_test():
    order = build_order("task_first", 20, 200, 1, seed=0)

    assert shuffle_proof(order, np.arange(220) < 20)["runs_p_value"] < 1e-6


def test_data_of_one_kind_has_no_p_value():
    proof = shuffle_proof(np.arange(5), np.ones(5, dtype=np.bool_))

    assert proof["runs_p_value"] is None
    assert proof["largest_gap"] == 0


@given(st.integers(1, 500), st.integers(1, 5), st.integers(1, 40), st.integers(0, 200))
def test_passes_reach_the_fewest_steps_and_never_fall_below_the_epochs(
    num_examples, epochs, batch_size, min_steps
):
    passes = num_passes(num_examples, epochs, batch_size, min_steps)

    assert passes >= epochs
    assert passes * num_examples >= min_steps * batch_size
    assert passes == epochs or (passes - 1) * num_examples < min_steps * batch_size


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 5))
def test_visits_of_a_repeated_order_are_counted_without_laying_it_out(num_task, positions, seed):
    order = repeated_order(num_task, positions, seed) if positions else np.empty(0, dtype=np.int32)

    visits = repeated_visits(num_task, positions, seed)

    assert visits.tolist() == np.bincount(order, minlength=num_task).tolist()
