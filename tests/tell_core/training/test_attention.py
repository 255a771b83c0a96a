from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import ModelError
from tell_core.spec.model import TrainingSpec
from tell_core.training.attention import attended, choose_limits, packing_refusal
from tell_core.training.batching import Limits
from tell_core.training.devices import Precision
from tell_core.training.gradients import StepLosses, step_gradients
from tell_core.training.models import LoadedModel, attach_lora, detach_adapter
from tests.tell_core.training.families import CONFIGS, REFUSED, family_model

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, None)
ONE_BY_ONE = Limits("padded", max_examples=1)


def step(
    model: Any, examples: EncodedExamples, rows: np.ndarray, limits: Limits
) -> tuple[StepLosses, torch.Tensor]:
    """Losses and the whole gradient, flat, of one step."""
    model.zero_grad(set_to_none=True)
    with attended(model, limits):
        losses = step_gradients(model, examples, rows, limits=limits, device=CPU, precision=FLOAT32)
    return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=st.sampled_from(["padded", "length_grouped", "packed"]),
    max_examples=st.one_of(st.none(), st.integers(1, 5)),
    max_tokens=st.one_of(st.none(), st.integers(5, 90)),
    seed=st.integers(0, 99),
)
def test_every_layout_gives_loss_and_gradient_of_the_examples_one_by_one(
    base: LoadedModel,
    random_examples: Callable[..., EncodedExamples],
    layout: Any,
    max_examples: int | None,
    max_tokens: int | None,
    seed: int,
):
    examples = random_examples(4, 5, seed)
    rows = np.random.default_rng(seed).integers(0, 9, size=8)

    losses, gradient = step(base.model, examples, rows, Limits(layout, max_examples, max_tokens))

    expected, expected_gradient = step(base.model, examples, rows, ONE_BY_ONE)
    base.model.zero_grad(set_to_none=True)
    assert losses.loss == pytest.approx(expected.loss, rel=1e-6)
    assert losses.task_loss == pytest.approx(expected.task_loss, rel=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_is_packed_with_the_gradient_of_single_examples(
    family: str,
    random_examples: Callable[..., EncodedExamples],
    training_spec: Callable[..., TrainingSpec],
):
    """LoRA on all of its linear layers; rows of 6 to 20 tokens, windows of 8."""
    examples, rows = random_examples(3, 4), np.arange(7)
    model = family_model(CONFIGS[family])
    assert packing_refusal(model, examples, rows, CPU, FLOAT32) is None
    adapted = attach_lora(model, training_spec(lora_rank=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)

    losses, gradient = step(adapted, examples, rows, Limits("packed", None, 60))

    expected, expected_gradient = step(adapted, examples, rows, ONE_BY_ONE)
    detach_adapter(adapted)
    assert losses.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_packed_is_grouped_by_length_and_packing_refused_with_the_reason(
    family: str,
    random_examples: Callable[..., EncodedExamples],
    training_spec: Callable[..., TrainingSpec],
):
    config, word = REFUSED[family]
    model, examples, rows = family_model(config), random_examples(3, 4), np.arange(7)

    def choose(batching: str) -> Limits:
        spec = training_spec(batching=batching)
        return choose_limits(model, examples, rows, spec, CPU, FLOAT32)

    assert choose("auto").layout == "length_grouped"
    with pytest.raises(ModelError, match=rf"{family}.*{word}.*length_grouped"):
        choose("packed")


def test_attention_across_packed_examples_is_noticed(
    base: LoadedModel, random_examples: Callable[..., EncodedExamples], monkeypatch: Any
):
    from tell_core.training import attention

    def leaking(*arguments: Any, segment_lengths: Any = None, **options: Any) -> Any:
        return original(*arguments, **options)

    original = attention.segment_attention
    monkeypatch.setattr(attention, "segment_attention", leaking)

    refusal = packing_refusal(base.model, random_examples(3, 3), np.arange(6), CPU, FLOAT32)

    assert refusal is not None
    assert "differ" in refusal


def test_a_model_attends_as_before_once_packing_is_over(base: LoadedModel):
    def implementations(model: PreTrainedModel) -> set[str]:
        modules = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        return {part.config._attn_implementation for part in modules}

    with attended(base.model, Limits("packed")):
        assert implementations(base.model) == {"tell_segments"}

    assert implementations(base.model) == {"sdpa"}
