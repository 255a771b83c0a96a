"""Generation: the same answers however the prompts are batched."""

from dataclasses import replace
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
from tell_core.evaluation.generation import (
    Decoding,
    Request,
    draw_tokens,
    end_token_ids,
    generate,
    generate_greedy,
    uniform_draws,
)
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


def written(
    base: LoadedModel, requests: list[Request], decoding: Decoding, size: int = 4, **options: Any
) -> list[str]:
    return generate(
        base.model, base.tokenizer, requests, decoding, batch_size=size, device=CPU, **options
    )


def mixed_requests(count: int) -> list[Request]:
    prompts = random_prompts(count, 256, seed=3)
    return [Request(prompt, 1 + 5 * i % 13, seed=i) for i, prompt in enumerate(prompts)]


@settings(max_examples=8, deadline=None)
@given(
    size=st.integers(1, 10),
    rows=st.permutations(range(8)).flatmap(
        lambda order: st.integers(1, 8).map(lambda count: order[:count])
    ),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    stop=st.lists(st.text("abcdef ", min_size=1, max_size=2), max_size=2).map(tuple),
    order_seed=st.none() | st.integers(0, 9),
)
def test_an_answer_depends_on_its_own_request_alone(
    base: LoadedModel, size: int, rows: list[int], temperature: float, top_p: float,
    stop: tuple[str, ...], order_seed: int | None,
) -> None:  # fmt: skip
    requests = mixed_requests(8)
    decoding = Decoding(stop=stop, temperature=temperature, top_p=top_p)
    alone = {row: written(base, [requests[row]], decoding, 1)[0] for row in rows}

    together = written(base, [requests[row] for row in rows], decoding, size, order_seed=order_seed)

    assert together == [alone[row] for row in rows]


def test_drawn_answers_differ_by_seed_and_repeat_with_it(base: LoadedModel) -> None:
    requests = [Request(random_prompts(1, 256)[0], 8, seed=seed) for seed in (1, 2, 1)]

    first, second, again = written(base, requests, Decoding(temperature=3.0))

    assert first == again
    assert first != second


def test_limit_cuts_an_answer_without_changing_what_stands_before(base: LoadedModel) -> None:
    long = mixed_requests(6)
    long = [replace(request, max_new_tokens=12) for request in long]
    short = [replace(request, max_new_tokens=1 + row) for row, request in enumerate(long)]
    drawn = Decoding(temperature=1.0)
    ids = Ids()

    def words(requests: list[Request]) -> list[list[str]]:
        texts = generate(base.model, ids, requests, drawn, batch_size=3, device=CPU)  # type: ignore[arg-type]
        return [text.split() for text in texts]

    assert words(short) == [whole[: 1 + row] for row, whole in enumerate(words(long))]


def scripted(base: LoadedModel, text: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the model say ``text``, a token per step in every row; row counts of its steps."""
    said = base.tokenizer(text)["input_ids"]
    num_rows: list[int] = []

    def speak(input_ids: torch.Tensor, **_: Any) -> Any:
        token = said[len(num_rows)]
        num_rows.append(len(input_ids))
        logits = torch.nn.functional.one_hot(torch.tensor(token), 300).float()
        cache = SimpleNamespace(reorder_cache=lambda rows: None)
        return SimpleNamespace(logits=logits.expand(len(input_ids), 1, -1), past_key_values=cache)

    monkeypatch.setattr(base.model, "forward", speak)
    return num_rows


@pytest.mark.parametrize(
    ("said", "stop", "kept"),
    [
        ("one END two", ("END",), "one "),
        ("one END two", ("two", "END"), "one "),
        ("one END two", ("ND", "END"), "one "),
        ("Þá kom hún. Svo", ("hún",), "Þá kom "),
        ("one", ("END",), "one"),
        ("ENDone", ("END",), ""),
        ("a<b<<c", ("<<",), "a<b"),
        ("one<|end|>two", ("<|end|>",), "one"),
    ],
)
def test_answer_is_cut_before_the_first_stop_string(
    base: LoadedModel, said: str, stop: tuple[str, ...], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = len(base.tokenizer(said)["input_ids"])
    scripted(base, said, monkeypatch)

    (text,) = written(base, [Request(np.asarray([1]), num_tokens)], Decoding(stop=stop))

    assert text == kept


def test_one_limit_and_stop_strings_for_all_prompts(
    base: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(base, "one END two", monkeypatch)

    texts = generate_greedy(
        base.model, base.tokenizer, [np.asarray([1]), np.asarray([2, 3])],
        max_new_tokens=11, batch_size=2, device=CPU, stop=("END",),
    )  # fmt: skip

    assert texts == ["one ", "one "]


def test_row_leaves_its_batch_when_its_stop_string_is_complete(
    base: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = scripted(base, "one END two three", monkeypatch)
    requests = [Request(np.asarray([1]), limit) for limit in (2, 17, 17)]

    written(base, requests, Decoding(stop=("END",)))

    assert num_rows == [3, 3, 2, 2, 2, 2, 2]


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8),
    draw=st.integers(0, 2**32 - 1).map(lambda k: k / 2**32),
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.05, 1),
)
def test_draw_inverts_the_cumulative_distribution_of_the_likeliest(
    logits: list[float], draw: float, temperature: float, top_p: float
) -> None:
    weights = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
    order = np.argsort(-weights, kind="stable") if top_p < 1 else np.arange(len(weights))
    sums = np.cumsum(weights[order] / weights.sum())
    num_kept = len(sums) if top_p == 1 else 1 + int((sums[:-1] < top_p).sum())
    reached = sums[:num_kept] / sums[num_kept - 1]

    (token,) = draw_tokens(
        torch.tensor([logits]), torch.tensor([draw], dtype=torch.float64), temperature, top_p
    ).tolist()

    place = order.tolist().index(token)
    assert place < num_kept or abs(sums[num_kept - 1] - top_p) < 1e-12
    assert reached[min(place, num_kept - 1)] >= draw - 1e-12
    assert place == 0 or reached[place - 1] <= draw + 1e-12


def test_drawn_tokens_have_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = torch.from_numpy(uniform_draws(0, 20_000))

    tokens = draw_tokens(logits.expand(len(draws), -1), draws, 1.0, 1.0)

    shares = np.bincount(tokens.numpy(), minlength=4) / len(draws)
    assert shares == pytest.approx(torch.softmax(logits[0], 0).numpy(), abs=0.012)


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.4]]))
    draws = torch.from_numpy(uniform_draws(1, 500))

    def tokens(top_p: float) -> set[int]:
        return set(draw_tokens(logits.expand(500, -1), draws, 1.0, top_p).tolist())

    assert tokens(0.4) == {1}
    assert tokens(0.6) == {1, 2}
    assert tokens(0.95) == {0, 1, 2}


def test_uniform_draws_of_a_longer_stream_begin_alike() -> None:
    assert uniform_draws(7, 3).tolist() == uniform_draws(7, 9).tolist()[:3]
