"""Gold log-likelihood against the plain computation, example by example."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.evaluation import likelihood
from tell_core.evaluation.likelihood import gold_nll
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")


def random_examples(count: int, seed: int = 0) -> EncodedExamples:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 30, size=count)
    return from_lists(
        [
            (generator.integers(0, 256, size=length).tolist(), int(generator.integers(1, length)))
            for length in lengths
        ],
        is_task=True,
    )


def plain_nll(base: LoadedModel, examples: EncodedExamples, index: int) -> float:
    ids = torch.as_tensor(examples.example(index).astype(np.int64))
    with torch.no_grad():
        log_probabilities = base.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    positions = range(int(examples.response_starts[index]), len(ids))
    return -sum(float(log_probabilities[at - 1, ids[at]]) for at in positions)


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 12), seed=st.integers(0, 99))
def test_sum_over_supervised_tokens_equals_the_plain_computation(
    base: LoadedModel, count: int, seed: int
) -> None:
    examples = random_examples(count, seed)

    expected = [plain_nll(base, examples, index) for index in range(count)]

    np.testing.assert_allclose(gold_nll(base.model, examples, CPU), expected, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "supervised"), [(1, 1), (40, 10_000), (10_000, 25)])
def test_size_of_batches_does_not_change_the_result(
    base: LoadedModel, monkeypatch: pytest.MonkeyPatch, tokens: int, supervised: int
) -> None:
    examples = random_examples(20)
    together = gold_nll(base.model, examples, CPU)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(likelihood, "BATCH_SUPERVISED_TOKENS", supervised)
    seen: list[tuple[int, int]] = []

    split = gold_nll(base.model, examples, CPU, lambda done, total: seen.append((done, total)))

    np.testing.assert_allclose(split, together, rtol=1e-5)
    assert len(seen) > 1
    assert seen[-1] == (20, 20)


def test_no_examples_give_an_empty_result(base: LoadedModel) -> None:
    assert gold_nll(base.model, from_lists([], True), CPU).shape == (0,)
