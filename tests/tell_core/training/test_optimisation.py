import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tell_core.spec.model import TrainingSpec
from tell_core.training.models import LoadedModel
from tell_core.training.optimisation import (
    create_optimiser,
    learning_rate_at,
    optimiser_tensors,
    restore_optimiser,
    set_learning_rate,
    trainable_parameters,
)

SCHEDULES = st.sampled_from(["cosine", "linear", "constant"])


@given(schedule=SCHEDULES, num_steps=st.integers(1, 500), fraction=st.floats(0, 0.99))
def test_the_learning_rate_is_positive_and_peaks_at_its_peak(
    training_spec: Callable[..., TrainingSpec], schedule: str, num_steps: int, fraction: float
):
    training = training_spec(schedule=schedule, warmup_fraction=fraction)

    rates = [learning_rate_at(step, num_steps, training, 0.01) for step in range(num_steps)]

    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.01)


@given(schedule=SCHEDULES, num_steps=st.integers(1, 500), fraction=st.floats(0, 0.99))
def test_the_learning_rate_rises_then_never_rises_again(
    training_spec: Callable[..., TrainingSpec], schedule: str, num_steps: int, fraction: float
):
    training = training_spec(schedule=schedule, warmup_fraction=fraction)

    rates = [learning_rate_at(step, num_steps, training, 0.01) for step in range(num_steps)]

    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_norms_do_not_decay(base: LoadedModel):
    model = copy.deepcopy(base.model).requires_grad_(True)

    groups = create_optimiser(trainable_parameters(model), 0.1).param_groups

    decays = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_a_restored_optimiser_takes_the_same_next_step(base: LoadedModel):
    def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        set_learning_rate(optimiser, 0.01)
        optimiser.step()

    one = copy.deepcopy(base.model).requires_grad_(True)
    first = create_optimiser(trainable_parameters(one), 0.1)
    step(one, first, 0)
    two = copy.deepcopy(one)
    second = create_optimiser(trainable_parameters(two), 0.1)
    moments = optimiser_tensors(trainable_parameters(one), first)
    restore_optimiser(trainable_parameters(two), second, moments, step=1)

    step(one, first, 1)
    step(two, second, 1)

    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
