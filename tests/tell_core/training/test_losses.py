from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel

from tell_core.data.encoding import EncodedExamples
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
