"""Choice of tokens: by loss, not by copying, and told apart by reason."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis.quanta.tokens import (
    all_supervised,
    induction_mask,
    select_tokens,
    supervised_places,
    token_losses,
    token_samples,
)
from tell_core.data.encoding import from_lists
from tell_core.errors import DataError
from tell_core.evaluation.likelihood import gold_nll
from tell_core.training.devices import resolve_device

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.integers(1, 11)).filter(
        lambda pair: pair[1] < len(pair[0])
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(pairs=SEQUENCES, ngram=st.integers(2, 4))
def test_a_token_is_a_copy_when_its_ngram_occurred_before(pairs, ngram: int):
    examples = from_lists(pairs, is_task=False)

    mask = induction_mask(examples, ngram)

    for is_copy, row, position in zip(mask, *supervised_places(examples), strict=True):
        tokens = pairs[row][0]
        gram = tokens[position + 1 - ngram : position + 1]
        earlier = [tokens[end - ngram : end] for end in range(ngram, position + 1)]
        assert is_copy == (position + 1 >= ngram and gram in earlier)


@settings(deadline=None)
@given(pairs=SEQUENCES)
def test_without_a_length_nothing_is_a_copy(pairs):
    assert not induction_mask(from_lists(pairs, is_task=False), 0).any()


@settings(deadline=None)
@given(pairs=SEQUENCES)
def test_supervised_places_are_those_of_the_responses(pairs):
    expected = [
        (row, position)
        for row, (tokens, start) in enumerate(pairs)
        for position in range(start, len(tokens))
    ]

    rows, positions = supervised_places(from_lists(pairs, is_task=False))

    assert list(zip(rows, positions, strict=True)) == expected


def test_token_losses_add_up_to_those_of_the_examples(barely_trained):
    model, examples, _ = barely_trained
    text = all_supervised(examples.select(range(30)))

    losses = token_losses(model, text)

    totals = np.bincount(supervised_places(text)[0], losses)
    np.testing.assert_allclose(totals, gold_nll(model, text, resolve_device("cpu")), rtol=1e-4)


def test_the_loss_of_a_token_cut_out_is_its_loss_in_context(barely_trained):
    model, examples, _ = barely_trained
    text = all_supervised(examples.select(range(30)))
    chosen = select_tokens(model, text, limit=25, floor=0, ceiling=9)

    samples = token_samples(text, chosen)

    np.testing.assert_allclose(token_losses(model, samples), chosen.losses, rtol=1e-3)


def test_every_token_is_counted_once(barely_trained):
    model, examples, _ = barely_trained

    chosen = select_tokens(
        model, all_supervised(examples.select(range(200))), limit=10, floor=3, ceiling=5, ngram=2
    )

    counts = dict(chosen.counts)
    assert counts.pop("supervised") == sum(counts.values())
    assert counts["chosen"] == len(chosen) == 10
    assert ((chosen.losses >= 3) & (chosen.losses <= 5)).all()


def test_a_smaller_choice_is_part_of_a_larger_one(barely_trained):
    model, examples, _ = barely_trained
    few = select_tokens(model, examples, limit=10, floor=0, ceiling=9)

    many = select_tokens(model, examples, limit=40, floor=0, ceiling=9)

    assert set(few.examples.tolist()) <= set(many.examples.tolist())


def test_a_model_that_has_learned_nothing_is_refused(barely_trained):
    model, examples, _ = barely_trained

    with pytest.raises(DataError, match="at least 20"):
        select_tokens(model, examples, limit=10, floor=1e-12, ceiling=1e-11, at_least=20)
