from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.errors import DataError
from tell_core.training.collation import check_examples, collate, pack

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


@given(seed=st.integers(0, 1000), data=st.data())
def test_packed_examples_follow_one_another_without_padding(
    random_examples: Callable[..., EncodedExamples], seed: int, data: st.DataObject
):
    examples = random_examples(3, 4, seed)
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))

    batch = pack(examples, rows, CPU)

    ids = [examples.example(row) for row in rows]
    assert batch.input_ids_RL.tolist() == [np.concatenate(ids).tolist()]
    assert batch.position_ids_RL is not None
    assert batch.position_ids_RL.tolist() == [[at for one in ids for at in range(len(one))]]
    assert batch.segment_lengths == tuple(map(len, ids))
    assert batch.num_padded_tokens == batch.num_tokens == sum(map(len, ids))


@given(seed=st.integers(0, 1000))
def test_packed_and_padded_supervise_the_same_tokens(
    random_examples: Callable[..., EncodedExamples], seed: int
):
    examples = random_examples(3, 4, seed)

    packed, padded = pack(examples, range(7), CPU), collate(examples, range(7), CPU)

    assert torch.equal(packed.targets_S, padded.targets_S)
    assert torch.equal(packed.batch_rows_S, padded.batch_rows_S)
    assert torch.equal(packed.input_ids_RL.flatten()[packed.positions_S + 1], packed.targets_S)


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
