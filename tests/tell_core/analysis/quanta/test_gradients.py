"""Per-sample gradients: right, one backward each, and the model left as it was."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tell_core.analysis.quanta.gradients import (
    layer_shapes,
    linear_layers,
    looped_gradients,
    project_gradients,
    relative_errors,
)
from tell_core.analysis.quanta.loading import load_subject
from tell_core.analysis.quanta.projection import CountSketch, Exact
from tell_core.data.encoding import from_lists
from tell_core.errors import ModelError
from tell_core.training.batching import Limits


@pytest.fixture
def model(barely_trained) -> nn.Module:
    return barely_trained[0]


@pytest.fixture
def samples():
    """Examples of unequal lengths with one to six supervised tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(7, 15, 20)
    starts = [int(length - generator.integers(1, 7)) for length in lengths]
    rows = [generator.integers(0, 32, length) for length in lengths]
    return from_lists(list(zip(rows, starts, strict=True)), is_task=False)


def exact(model: nn.Module, samples) -> np.ndarray:
    return project_gradients(model, samples, Exact(layer_shapes(model))).vectors


def test_batched_gradients_equal_those_of_a_loop(model, samples):
    assert relative_errors(exact(model, samples), looped_gradients(model, samples)).max() <= 1e-4


@pytest.mark.parametrize("layer", [0, 5])
def test_the_comparison_fails_when_a_weight_moves_by_a_thousandth(layer: int, model, samples):
    other = copy.deepcopy(model)
    with torch.no_grad():
        list(linear_layers(other).values())[layer].weight[0, 0] += 1e-3

    errors = relative_errors(exact(model, samples), looped_gradients(other, samples))

    assert errors.max() > 1e-4


def test_every_sample_goes_backward_exactly_once(model, samples):
    rows_backward = []
    own = copy.deepcopy(model)

    def count(_: object, __: object, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: rows_backward.append(len(grad)))

    own.model.norm.register_forward_hook(count)

    found = project_gradients(own, samples, CountSketch(64), limits=Limits("length_grouped", 3))

    assert sum(rows_backward) == found.num_backwards == len(samples)


def test_the_size_of_batches_does_not_matter(model, samples):
    alone = project_gradients(model, samples, CountSketch(64), limits=Limits("length_grouped", 1))

    together = project_gradients(model, samples, CountSketch(64))

    assert relative_errors(together.vectors, alone.vectors).max() <= 1e-4
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-4)


def test_the_model_is_left_as_it_was(model, samples):
    model.train()
    before = [weight.requires_grad for weight in model.parameters()]

    project_gradients(model, samples, CountSketch(64))

    assert model.training
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())
    model.eval()


def test_the_output_layer_is_left_out(model):
    assert not any("lm_head" in name for name in linear_layers(model))


def test_a_model_without_linear_layers_is_refused():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 3)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ModelError, match="no linear layer"):
        linear_layers(Lookup())


def test_adapters_are_merged_so_that_all_base_weights_have_a_gradient(
    model, samples, tmp_path, monkeypatch
):
    from tell_core.training import models

    trained = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    trained.save_pretrained(tmp_path / "train" / "adapter")
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: None)

    subject, _ = load_subject(str(tmp_path / "base"), trained=tmp_path / "train")

    merged = trained.merge_and_unload()
    assert linear_layers(subject).keys() == linear_layers(model).keys()
    assert relative_errors(exact(subject, samples), looped_gradients(merged, samples)).max() < 1e-4
    assert relative_errors(exact(subject, samples), looped_gradients(model, samples)).max() > 1e-2
