"""Greedy generation: the same answers however the prompts are batched."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM as AutoModel
from transformers import Gemma2Config, GenerationConfig, GPT2Config, PreTrainedModel

from tell_core.errors import EvaluationError
from tell_core.evaluation.generation import end_token_ids, generate_greedy
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")
MAX_NEW_TOKENS = 8


class Ids:
    """A tokenizer that shows token ids."""

    eos_token_id: int | list[int] | None = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def random_prompts(count: int, vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, size=n) for n in generator.integers(1, 30, count)]


def answers(
    model: Any, prompts: list[np.ndarray], batch_size: int, stop_ids: set[int]
) -> list[str]:
    return generate_greedy(
        model,
        Ids(),  # type: ignore[arg-type]
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        device=CPU,
        stop_ids=stop_ids,
    )


def one_by_one(model: PreTrainedModel, prompts: list[np.ndarray], stop_ids: set[int]) -> list[str]:
    """The answers by `transformers.generate`, each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.as_tensor(prompt)[None]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=sorted(stop_ids | end_token_ids(model, Ids())),  # type: ignore[arg-type]
                pad_token_id=0,
            ),
        )[0, len(prompt) :].tolist()
        ends = stop_ids | end_token_ids(model, Ids())  # type: ignore[arg-type]
        found.append(" ".join(str(token) for token in written if token not in ends))
    return found


def other_architectures() -> list[PreTrainedModel]:
    """Sliding windows and capped logits (Gemma 2), and learned positions (GPT-2)."""
    gemma = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, sliding_window=8,
        initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    gpt = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        eos_token_id=60,
    )  # fmt: skip
    torch.manual_seed(0)
    return [AutoModel.from_config(config).eval() for config in (gemma, gpt)]


@settings(max_examples=6, deadline=None)
@given(
    batch_size=st.integers(1, 12),
    order=st.permutations(range(7)),
    stop_ids=st.sets(st.integers(0, 255), max_size=120),
)
def test_answers_depend_neither_on_batch_size_nor_on_order(
    base: LoadedModel, batch_size: int, order: list[int], stop_ids: set[int]
) -> None:
    prompts = random_prompts(7, 256)
    alone = answers(base.model, prompts, 1, stop_ids)

    together = answers(base.model, [prompts[row] for row in order], batch_size, stop_ids)

    assert together == [alone[row] for row in order]


def test_answers_equal_those_of_transformers(base: LoadedModel) -> None:
    prompts, stop_ids = random_prompts(12, 256, seed=1), set(range(0, 256, 9))

    batched = answers(base.model, prompts, 5, stop_ids)

    assert batched == one_by_one(base.model, prompts, stop_ids)
    assert len({len(answer.split()) for answer in batched}) > 2


@pytest.mark.parametrize("model", other_architectures(), ids=["gemma2", "gpt2"])
def test_other_architectures_answer_alike(model: PreTrainedModel) -> None:
    prompts, stop_ids = random_prompts(8, 61, seed=2), {3, 17, 44}

    assert answers(model, prompts, 3, stop_ids) == one_by_one(model, prompts, stop_ids)


def test_end_tokens_come_from_every_configuration() -> None:
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=[7, 8]),
        config=SimpleNamespace(eos_token_id=9),
    )
    tokenizer = SimpleNamespace(eos_token_id=None)

    assert end_token_ids(model, tokenizer) == {7, 8, 9}  # type: ignore[arg-type]


def test_sampling_settings_of_the_model_have_no_effect(base: LoadedModel) -> None:
    prompts = random_prompts(4, 256)
    plain = answers(base.model, prompts, 4, set())
    before = base.model.generation_config
    base.model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=before.eos_token_id
    )

    changed = answers(base.model, prompts, 4, set())

    base.model.generation_config = before
    assert changed == plain


def test_end_token_at_once_gives_an_empty_answer(base: LoadedModel) -> None:
    assert answers(base.model, random_prompts(3, 256), 2, set(range(300))) == ["", "", ""]


def test_text_is_decoded_without_special_tokens(base: LoadedModel) -> None:
    prompt = np.asarray(base.tokenizer("Word?")["input_ids"])

    (text,) = generate_greedy(
        base.model, base.tokenizer, [prompt], max_new_tokens=5, batch_size=1, device=CPU
    )

    assert isinstance(text, str)
    assert "<|" not in text


def test_progress_counts_answers(base: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []

    generate_greedy(
        base.model,
        base.tokenizer,
        random_prompts(5, 256),
        max_new_tokens=1,
        batch_size=2,
        device=CPU,
        on_progress=lambda done, total: seen.append((done, total)),
    )

    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_no_prompts_give_no_answers(base: LoadedModel) -> None:
    assert answers(base.model, [], 4, set()) == []


def test_prompt_without_tokens_is_refused(base: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="prompt 1 has no tokens"):
        answers(base.model, [np.asarray([5]), np.asarray([], dtype=np.int64)], 2, set())


def test_answer_ends_where_the_context_is_full(base: LoadedModel) -> None:
    context = base.model.config.max_position_embeddings
    prompts = [np.full(context - 3, 7), np.full(5, 7)]

    long, short = answers(base.model, prompts, 2, set())

    assert len(long.split()) == 3
    assert len(short.split()) == MAX_NEW_TOKENS


def test_prompt_that_fills_the_context_is_refused(base: LoadedModel) -> None:
    context = base.model.config.max_position_embeddings

    with pytest.raises(EvaluationError, match=f"prompt 1 has {context} tokens"):
        answers(base.model, [np.asarray([5]), np.full(context, 7)], 2, set())
