import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from tell_core.data.encoding import EncodedExamples
from tell_core.errors import ModelError
from tell_core.spec.model import TrainingSpec
from tell_core.training import attention
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


def kernel_of_2_11(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """What torch's kernel computes, (L, H, D), by masks; its arguments are those of torch 2.11."""
    assert (cu_seq_q.tolist(), max_q) == (cu_seq_k.tolist(), max_k)
    num_tokens, groups = len(query), query.shape[1] // key.shape[1]
    segment = torch.bucketize(torch.arange(num_tokens), cu_seq_q[1:], right=True)
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    most = window_size[0] if window_size[0] >= 0 else num_tokens
    seen = (segment[:, None] == segment) & (distance >= -window_size[1]) & (distance <= most)
    heads = [each.transpose(0, 1) for each in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(
        heads[0], *(each.repeat_interleave(groups, 0) for each in heads[1:]), seen, scale=scale
    )
    return output.transpose(0, 1)


def kernel_of_2_12(
    query: torch.Tensor, key: torch.Tensor, *more: Any, enable_gqa: bool = False, **options: Any
) -> torch.Tensor:
    """From torch 2.12 on it has to be told of groups of heads."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return kernel_of_2_11(query, key, *more, **options)


kernel_of_2_12.__signature__ = inspect.signature(kernel_of_2_11).replace(  # type: ignore[attr-defined]
    parameters=[
        *inspect.signature(kernel_of_2_11).parameters.values(),
        inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False),
    ]
)


@pytest.mark.parametrize("kernel", [kernel_of_2_11, kernel_of_2_12])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_of_every_torch_is_asked_for_what_single_examples_see(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, key_heads: int, window: int | None
):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    attention._kernel_arguments.cache_clear()
    module, lengths = torch.nn.Module(), [5, 1, 9]
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 15, 8) for heads in (4, key_heads, key_heads)]
    if key_heads < 4:
        module.num_key_value_groups = 4 // key_heads

    found = attention._by_varlen_kernel(*states, lengths, window, {"scaling": 0.3})

    attention._kernel_arguments.cache_clear()
    expected = attention.segment_attention(
        module, *states, None, segment_lengths=tuple(lengths), sliding_window=window, scaling=0.3
    )[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_kernel_is_used_where_autocast_would_compute_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
):
    query = torch.zeros(1, 1, 1, 8)  # float32, as after a norm with float32 weights

    assert not attention._has_kernel(attention._compute_dtype(query))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention._has_kernel(attention._compute_dtype(query))
    monkeypatch.setattr(attention, "_kernel_arguments", lambda: frozenset({"is_causal"}))
    assert not attention._has_kernel(torch.bfloat16)  # torch 2.10


def test_attention_across_packed_examples_is_noticed(
    base: LoadedModel, random_examples: Callable[..., EncodedExamples], monkeypatch: Any
):
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
