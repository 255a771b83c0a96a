import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel

from tell_core.data.encoding import EncodedExamples
from tell_core.training import losses
from tell_core.training.collation import collate
from tell_core.training.losses import supervised_logits, supervised_nll
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")


def other_architectures() -> list[PreTrainedModel]:
    """Logits that are capped (Gemma 2), and learned positions with dropout (GPT-2)."""
    gemma = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, final_logit_softcapping=2.0,
        sliding_window=8, pad_token_id=None,
    )  # fmt: skip
    gpt = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(0)
    return [AutoModelForCausalLM.from_config(config).eval() for config in (gemma, gpt)]


def test_logits_at_supervised_positions_equal_those_of_the_full_forward_pass(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    batch = collate(random_examples(4, 4), range(8), CPU)

    for model in [base.model, *other_architectures()]:
        full = model(input_ids=batch.input_ids_RL).logits.flatten(0, 1)[batch.positions_S]
        narrowed = supervised_logits(model, batch.input_ids_RL, batch.positions_S)
        torch.testing.assert_close(narrowed, full, rtol=0, atol=1e-6)


def test_a_model_without_output_layer_module_falls_back_to_full_logits(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    class Wrapped(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return base.model(input_ids=input_ids, use_cache=use_cache)

        def get_output_embeddings(self) -> None:
            return None

    batch = collate(random_examples(2, 2), range(4), CPU)

    fallen_back = supervised_nll(Wrapped(), batch)

    torch.testing.assert_close(fallen_back, supervised_nll(base.model, batch))


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
def test_losses_and_gradients_in_chunks_equal_those_of_all_logits_at_once(
    random_examples: Callable[..., EncodedExamples],
    base: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    is_trained: bool,
):
    """Plain logits, capped ones (Gemma 2) and positions that are learned (GPT-2)."""
    batch = collate(random_examples(3, 3), range(6), CPU)
    weights_S = torch.linspace(-1, 2, len(batch.targets_S))

    for model in [base.model, *other_architectures()]:
        model = copy.deepcopy(model).double()
        model.get_output_embeddings().weight = nn.Parameter(
            model.get_output_embeddings().weight.detach().clone(), requires_grad=is_trained
        )

        def losses_and_gradients(model: nn.Module = model) -> list[torch.Tensor]:
            model.zero_grad()
            nll_S = supervised_nll(model, batch)
            (nll_S * weights_S).sum().backward()
            return [nll_S.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

        at_once = losses_and_gradients()
        with monkeypatch.context() as patch:
            patch.setitem(losses.LOGIT_BYTES, "cpu", chunk * 4 * 61)
            in_chunks = losses_and_gradients()

        for found, expected in zip(in_chunks, at_once, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_of_all_supervised_tokens_never_stand_in_memory_at_once(
    random_examples: Callable[..., EncodedExamples],
    base: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    model, rows = copy.deepcopy(base.model), []
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[-2]))
    model.lm_head.weight.requires_grad_(False)
    batch = collate(random_examples(3, 3), range(6), CPU)
    monkeypatch.setitem(losses.LOGIT_BYTES, "cpu", 5 * 4 * 61)

    supervised_nll(model, batch).sum().backward()

    assert max(rows) == 5 < len(batch.targets_S)


def test_an_output_layer_that_does_more_is_not_taken_apart(
    random_examples: Callable[..., EncodedExamples],
    base: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
):
    class Shifted(type(base.model)):  # type: ignore[misc]
        def forward(self, **arguments: object) -> object:
            output = super().forward(**arguments)
            output.logits = output.logits + torch.arange(61.0)
            return output

    model = copy.deepcopy(base.model)
    model.__class__ = Shifted
    batch = collate(random_examples(2, 2), range(4), CPU)
    expected = supervised_nll(model, batch)
    monkeypatch.setitem(losses.LOGIT_BYTES, "cpu", 4 * 61)

    torch.testing.assert_close(supervised_nll(model, batch), expected)


def test_padding_and_neighbours_do_not_change_the_loss_of_an_example(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    examples = random_examples(3, 3)
    together = collate(examples, range(6), CPU)
    sums = together.sum_by_row(supervised_nll(base.model, together).double().detach().numpy())

    alone = [supervised_nll(base.model, collate(examples, [row], CPU)).sum() for row in range(6)]

    assert sums == pytest.approx([value.item() for value in alone], abs=1e-4)


def test_loss_equals_that_of_transformers_with_masked_labels(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    examples = random_examples(3, 3)
    batch = collate(examples, range(6), CPU)
    labels = torch.full_like(batch.input_ids_RL, -100)
    for row, (start, length) in enumerate(
        zip(examples.response_starts, examples.lengths, strict=True)
    ):
        labels[row, start:length] = batch.input_ids_RL[row, start:length]

    theirs = base.model(input_ids=batch.input_ids_RL, labels=labels).loss

    torch.testing.assert_close(supervised_nll(base.model, batch).mean(), theirs)


def test_prompt_tokens_are_never_targets(
    random_examples: Callable[..., EncodedExamples], base: LoadedModel
):
    """With attention cut off, a prompt token could matter only as a target; none does."""
    examples = random_examples(1, 0)
    start = int(examples.response_starts[0])
    batch = collate(examples, [0], CPU)
    logits = supervised_logits(base.model, batch.input_ids_RL, batch.positions_S)

    changed = np.array(examples.tokens)
    changed[:start] = 7
    other = EncodedExamples(changed, examples.offsets, examples.response_starts, examples.is_task)

    targets = collate(other, [0], CPU).targets_S
    assert torch.equal(F.cross_entropy(logits, targets), F.cross_entropy(logits, batch.targets_S))
    assert len(targets) == examples.lengths[0] - start
