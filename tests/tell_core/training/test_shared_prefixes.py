from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.training.collation import collate
from tell_core.training.losses import reference_nll, supervised_nll
from tell_core.training.shared_prefixes import (
    group_by_prefix,
    lay_out_groups,
    prefixes_attended,
)
from tests.tell_core.training.families import CONFIGS, VOCAB_SIZE, family_model

CPU = torch.device("cpu")


@st.composite
def similar_examples(draw: st.DrawFn) -> EncodedExamples:
    """A few short examples over two tokens, so that many begin alike."""
    tokens = draw(st.lists(st.lists(st.integers(2, 3), min_size=2, max_size=7), max_size=7))
    starts = [draw(st.integers(1, len(each) - 1)) for each in tokens]
    return from_lists(list(zip(tokens, starts, strict=True)), is_task=True)


def sourced_examples(seed: int = 0) -> EncodedExamples:
    """Examples of two sources with beginnings of 9 and 4 tokens, and two of none; one is double."""
    generator = np.random.default_rng(seed)

    def draw(beginning: list[int], count: int) -> list[tuple[list[int], int]]:
        drawn = []
        for length in generator.integers(2, 12, size=count):
            whole = beginning + generator.integers(2, VOCAB_SIZE, size=length).tolist()
            drawn.append((whole, int(generator.integers(1, len(whole)))))
        return drawn

    first, second = (generator.integers(2, VOCAB_SIZE, size=size).tolist() for size in (9, 4))
    examples = [*draw(first, 5), *draw(second, 4), *draw([], 2)]
    return from_lists([*examples, examples[0]], is_task=True)


@given(similar_examples())
def test_every_example_is_in_one_group_that_shares_its_beginning(examples: EncodedExamples):
    groups = group_by_prefix(examples)

    assert sorted(row for group in groups for row in group.rows.tolist()) == [*range(len(examples))]
    for rows, num_shared in groups:
        beginnings = {tuple(examples.example(row)[:num_shared].tolist()) for row in rows}
        assert len(beginnings) == 1
        assert num_shared <= max(examples.lengths[rows].min() - 2, 0)


@given(similar_examples())
@settings(max_examples=40, deadline=None)
def test_no_other_division_computes_fewer_tokens(examples: EncodedExamples):
    count = len(examples)
    order = sorted(range(count), key=lambda row: examples.example(row)[:-1].tolist())

    def cost(start: int, end: int) -> int:
        run = [examples.example(row)[:-1].tolist() for row in order[start:end]]
        equal = [len(set(column)) == 1 for column in zip(*run, strict=False)]
        shared = min(*map(len, run), [*equal, False].index(False) + 1) - 1
        return sum(map(len, run)) - shared * (len(run) - 1)

    divisions = [
        [0, *cuts, count]
        for number in range(count)
        for cuts in combinations(range(1, count), number)
    ]
    least = min(
        (sum(map(cost, ends, ends[1:])) for ends in divisions),
        default=0,
    )

    assert sum(group.num_tokens(examples) for group in group_by_prefix(examples)) == least


@pytest.mark.parametrize("max_tokens", [16, 40, 500])
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_are_those_of_single_examples(family: str, max_tokens: int):
    """Grouped heads, sliding windows of 8 tokens and experts are among the families."""
    examples, model = sourced_examples(), family_model(CONFIGS[family])

    with torch.no_grad():
        alone = [reference_nll(model, collate(examples, [row], CPU)) for row in range(12)]
        for batch, blocks in lay_out_groups(examples, group_by_prefix(examples), max_tokens, CPU):
            with prefixes_attended(model, blocks):
                losses = supervised_nll(model, batch)

            expected = torch.cat([alone[row] for row in batch.rows])
            assert torch.allclose(losses, expected, atol=2e-4)


@given(seed=st.integers(0, 50), max_tokens=st.integers(4, 60))
@settings(max_examples=25, deadline=None)
def test_rows_hold_every_supervised_token_once_and_no_more_tokens_than_allowed(
    seed: int, max_tokens: int
):
    examples = sourced_examples(seed)

    batches = lay_out_groups(examples, group_by_prefix(examples), max_tokens, CPU)

    rows = np.concatenate([batch.tokens.rows for batch in batches])
    assert sorted(rows.tolist()) == [*range(len(examples))]
    for batch, blocks in batches:
        counts = np.bincount(batch.batch_rows_S.numpy())
        assert counts.tolist() == examples.supervised_counts[batch.rows].tolist()
        assert blocks[-1].end == batch.num_tokens == sum(batch.segment_lengths or ())
        assert batch.num_tokens <= max_tokens or len(batch.rows) == 1


def test_the_model_attends_as_before_afterwards():
    model = family_model(CONFIGS["llama"])
    examples = sourced_examples()
    (batch, blocks), *_ = lay_out_groups(examples, group_by_prefix(examples), 500, CPU)
    whole = collate(examples, range(12), CPU)
    before = supervised_nll(model, whole)

    with prefixes_attended(model, blocks):
        supervised_nll(model, batch)

    assert torch.equal(supervised_nll(model, whole), before)
