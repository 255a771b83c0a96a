from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.errors import DataError
from tell_core.training.collation import check_examples, collate, split_rows

CPU = torch.device("cpu")


@given(seed=st.integers(0, 1000), data=st.data())
def test_targets_are_exactly_the_tokens_from_each_response_start(
    random_examples: Callable[..., EncodedExamples], seed: int, data: st.DataObject
):
    examples = random_examples(3, 4, seed)
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))

    batch = collate(examples, rows, CPU)

    expected = [examples.example(row)[examples.response_starts[row] :] for row in rows]
    assert batch.targets_S.tolist() == np.concatenate(expected).tolist()
    assert batch.num_tokens == examples.lengths[rows].sum()


@given(seed=st.integers(0, 1000))
def test_each_position_stands_right_before_its_target(
    random_examples: Callable[..., EncodedExamples], seed: int
):
    examples = random_examples(3, 4, seed)

    batch = collate(examples, range(7), CPU)

    following = batch.input_ids_RL.flatten()[batch.positions_S + 1]
    assert torch.equal(following, batch.targets_S)


def test_row_sums_belong_to_their_rows(random_examples: Callable[..., EncodedExamples]):
    examples = random_examples(2, 2)
    batch = collate(examples, [3, 1], CPU)

    counts = batch.sum_by_row(np.ones(len(batch.targets_S)))

    assert counts.tolist() == examples.supervised_counts[[3, 1]].tolist()


@given(size=st.one_of(st.none(), st.integers(1, 9)), seed=st.integers(0, 100))
def test_micro_batches_partition_the_rows_of_a_step(
    random_examples: Callable[..., EncodedExamples], size: int | None, seed: int
):
    examples = random_examples(3, 4, seed)
    rows = np.array([5, 0, 3, 6, 1])

    parts = split_rows(examples, rows, size)

    assert sorted(np.concatenate(parts).tolist()) == sorted(rows.tolist())
    assert all(len(part) <= (size or len(rows)) for part in parts)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (([3, 4, 5], 3), "no supervised token"),
        (([3, 4, 5], 0), "nothing before it"),
        (([2] * 9, 4), "exceed the 8 tokens"),
        (([3, 61, 5], 1), "tokenizer of another model"),
    ],
)
def test_examples_that_cannot_be_trained_on_are_listed(example: tuple[list[int], int], words: str):
    examples = from_lists([([3, 4], 1), example], True)

    with pytest.raises(DataError, match=words):
        check_examples(examples, vocab_size=61, max_tokens=8)
