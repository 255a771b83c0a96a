import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tell_core.data.encoding import EncodedExamples
from tell_core.training.batching import Limits
from tell_core.training.devices import Precision
from tell_core.training.gradients import StepLosses, step_gradients
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")


def gradients(
    base: LoadedModel, examples: EncodedExamples, micro_batch_size: int | None
) -> tuple[StepLosses, torch.Tensor]:
    model = copy.deepcopy(base.model).requires_grad_(True)
    losses = step_gradients(
        model,
        examples,
        np.arange(len(examples)),
        limits=Limits("length_grouped", max_examples=micro_batch_size),
        device=CPU,
        precision=Precision(torch.float32, None),
    )
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return losses, flat


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_the_same_global_batch_gives_the_same_loss_and_gradient(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel, micro_batch_size: int
):
    examples = random_examples(3, 5)
    whole_losses, whole = gradients(base, examples, None)

    losses, split = gradients(base, examples, micro_batch_size)

    assert losses.loss == pytest.approx(whole_losses.loss, abs=1e-6)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_every_supervised_token_weighs_the_same(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    """Not a mean of means: a long and a short answer in separate micro-batches."""
    examples = random_examples(2, 0)

    losses, _ = gradients(base, examples, 1)

    sums = {int(rows[0]): sums[0] for rows, sums in losses.by_row}
    assert losses.loss == pytest.approx(sum(sums.values()) / examples.num_supervised_tokens)


def test_task_and_general_loss_average_to_the_loss(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    losses, _ = gradients(base, random_examples(3, 5), 2)

    assert losses.task_loss is not None
    assert losses.general_loss is not None
    num_general = losses.num_supervised - losses.num_task
    weighted = losses.task_loss * losses.num_task + losses.general_loss * num_general
    assert weighted / losses.num_supervised == pytest.approx(losses.loss)


def test_a_step_without_task_data_has_no_task_loss(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    losses, _ = gradients(base, random_examples(0, 3), None)

    assert losses.task_loss is None
    assert losses.general_loss == losses.loss


def test_supervising_the_prompt_too_would_change_the_gradient(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    """The label mask matters: the other gradient tests would pass without one."""
    examples = random_examples(2, 2)
    unmasked = replace(examples, response_starts=np.ones(4, dtype=np.int32))

    _, masked_gradient = gradients(base, examples, None)
    _, unmasked_gradient = gradients(base, unmasked, None)

    assert not torch.allclose(masked_gradient, unmasked_gradient, atol=1e-3)
