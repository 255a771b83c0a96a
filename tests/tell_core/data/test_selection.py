import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from tell_core.data import selection
from tell_core.data.curation import curate
from tell_core.data.mixtures import plan_cell
from tell_core.data.rendering import ChatRenderer
from tell_core.data.selection import (
    aligned_order,
    aligned_orders,
    diverse_order,
    diverse_orders,
    hashed_features,
    select_in_orders,
)
from tell_core.errors import TokenBudgetError
from tell_core.spec.cells import Cell

from .worlds import make_spec, write_world

vectors = st.integers(1, 40).flatmap(
    lambda count: arrays(np.float32, (count, 4), elements=st.floats(-1, 1, width=16))
)


def unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12)).astype(np.float32)


def coverage(features: np.ndarray, chosen: np.ndarray) -> float:
    """Sum over all examples of the similarity to the nearest chosen one."""
    return float(np.clip(features @ features[chosen].T, 0, 1).max(axis=1).sum())


@settings(deadline=None)
@given(vectors, st.integers(0, 3))
def test_diverse_order_holds_every_example_once(rows, seed):
    order = diverse_order(unit(rows), seed, "pool")

    assert sorted(order.tolist()) == list(range(len(rows)))


@settings(deadline=None, max_examples=50)
@given(vectors)
def test_each_choice_gains_as_much_as_any_other_would(rows):
    features = unit(rows)
    order = diverse_order(features, 0, "pool")

    step = len(features) / 255  # similarities are kept in 255 steps
    for count in range(1, min(len(order), 6)):
        reached = coverage(features, order[:count])
        others = [coverage(features, np.append(order[: count - 1], other)) for other in order]
        assert reached >= max(others) - 2 * step


def test_few_references_still_order_every_example(monkeypatch):
    monkeypatch.setattr(selection, "MIN_REFERENCES", 3)
    monkeypatch.setattr(selection, "_MAX_SIMILARITIES", 1)
    features = unit(np.random.default_rng(0).normal(size=(50, 8)))

    order = diverse_order(features, 0, "pool")

    assert sorted(order.tolist()) == list(range(50))


def test_equal_examples_come_after_one_of_each_kind():
    kinds = np.repeat(np.eye(4, dtype=np.float32), [20, 10, 5, 1], axis=0)

    order = diverse_order(kinds, 0, "pool")

    assert np.argmax(kinds[order[:4]], axis=1).tolist() == [0, 1, 2, 3]


def test_seed_decides_among_equal_gains():
    features = np.eye(30, dtype=np.float32)

    assert diverse_order(features, 0, "a").tolist() == diverse_order(features, 0, "a").tolist()
    assert diverse_order(features, 0, "a").tolist() != diverse_order(features, 1, "a").tolist()


def _features(*texts: str, size: int = 2) -> np.ndarray:
    return hashed_features(lambda: [texts[at : at + size] for at in range(0, len(texts), size)])


def test_texts_of_the_same_words_are_nearest():
    texts = ["sort the numbers", "sort the letters", "paint a red house", "paint a blue house"]

    products = _features(*texts, *texts) @ _features(*texts, *texts).T

    assert np.allclose(np.diag(products), 1, atol=1e-5)
    assert products[0, 4] == pytest.approx(1, abs=1e-5)
    assert products[0, 1] > 0.2 > products[0, 2]


def test_batches_make_no_difference():
    texts = [f"word {number % 3} and {number % 5}" for number in range(20)]

    assert np.array_equal(_features(*texts, size=3), _features(*texts, size=20))


def test_text_that_shares_nothing_is_like_no_other():
    features = _features("one two", "one two", "alone here")

    assert not features[2].any()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 30)), min_size=1, max_size=40),
    st.integers(30, 500),
    st.integers(0, 400),
    st.randoms(use_true_random=False),
)
def test_choice_in_given_orders_is_nested_and_never_over_budget(pool, budget, more, random):
    names = [name for name, _ in pool]
    counts = np.asarray([count for _, count in pool])
    orders = {}
    for name in "ab":
        order = list(range(names.count(name)))
        random.shuffle(order)
        orders[name] = np.asarray(order, dtype=np.int64)
    weights = {"a": 1.0, "b": 1.0}
    try:
        small = select_in_orders(counts, names, weights, budget, orders)
    except TokenBudgetError:
        return

    large = select_in_orders(counts, names, weights, budget + more, orders)

    assert counts[small].sum() <= budget
    assert set(small.tolist()) <= set(large.tolist())
    assert len(set(large.tolist())) == len(large)


def test_budget_below_every_first_example_is_an_error():
    orders = {"a": np.array([1, 0])}

    with pytest.raises(TokenBudgetError, match="general budget of 5 tokens holds no example"):
        select_in_orders(np.array([3, 9]), ["a", "a"], {"a": 1.0}, 5, orders)


def test_orders_follow_the_file_and_not_its_first_reading(tmp_path):
    path = tmp_path / "general.parquet"

    def write(prompts):
        rows = [{"source": "s", "prompt": text, "response": "r"} for text in prompts]
        schema = pa.schema([(name, pa.string()) for name in selection._TEXT_COLUMNS])
        pq.write_table(pa.Table.from_pylist(rows, schema), path)

    write(["one", "two"])
    first = diverse_orders(path, 0)["s"]
    write(["one", "two", "three"])

    assert (len(first), len(diverse_orders(path, 0)["s"])) == (2, 3)


def test_selective_arm_needs_random_choice_beside_it(tmp_path):
    write_world(tmp_path)

    with pytest.raises(ValidationError, match="add arm 'tell' to `arms`"):
        make_spec(tmp_path, arms=["sft", "tell_diverse"])


def test_diverse_arm_takes_other_general_examples_and_the_same_task_examples(tmp_path, tokenizer):
    write_world(tmp_path)
    spec = make_spec(tmp_path, arms=["tell", "tell_diverse"])
    curate(spec, tokenizer, tmp_path / "out")
    renderer = ChatRenderer(tokenizer)

    random, diverse = (
        plan_cell(spec, Cell(arm, 600, 2000, 0), tmp_path / "out", renderer) for arm in spec.arms
    )

    assert diverse["general_tokens"] <= 2000
    assert diverse["task_tokens"] == random["task_tokens"]
    assert diverse["general_tokens"] != random["general_tokens"]


@settings(deadline=None)
@given(vectors, vectors, st.integers(0, 3))
def test_aligned_order_is_a_permutation_by_falling_cosine(task, general, seed):
    order = aligned_order(task, general, seed, "pool")

    assert sorted(order.tolist()) == list(range(len(general)))
    has_gradient = general.any(axis=1)
    scores = unit(general) @ unit(task).mean(axis=0)
    ranked = scores[order][has_gradient[order]]
    assert np.all(np.diff(ranked) <= 1e-5)
    assert not has_gradient[order][has_gradient.sum() :].any()


@given(st.floats(1e-3, 1e3), st.integers(0, 19))
def test_length_of_a_gradient_makes_no_difference(factor, row):
    rng = np.random.default_rng(1)
    task, general = rng.normal(size=(5, 8)), rng.normal(size=(20, 8))
    longer = general.copy()
    longer[row] *= factor

    first, second = (aligned_order(task, pool, 0, "pool") for pool in (general, longer))

    assert first.tolist() == second.tolist()


def test_aligned_orders_look_at_the_given_task_examples_only(tmp_path):
    sources = pa.table({"source": ["a", "b", "a", "b"]})
    pq.write_table(sources, tmp_path / "general.parquet")
    np.save(tmp_path / "task_train.npy", np.eye(2, dtype=np.float32))
    np.save(tmp_path / "general.npy", np.eye(2, dtype=np.float32)[[0, 0, 1, 1]])

    for task_row, expected in ((0, [0, 1]), (1, [1, 0])):
        orders = aligned_orders(tmp_path, tmp_path / "general.parquet", np.array([task_row]), 0)
        assert orders["a"].tolist() == expected
    assert sorted(orders["b"].tolist()) == [0, 1]
