"""vLLM, with a stand-in for the package that checks how it is called."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tell_core.errors import EvaluationError, InputError
from tell_core.evaluation.generation import Decoding, Request
from tell_core.evaluation.vllm_backend import VllmEngine, check_vllm, vllm_engine
from tell_core.training.models import LoadedModel


@dataclass
class SamplingParams:
    """The fields that are given; the defaults are vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Calls:
    """What the package was asked."""

    engines: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    parameters: list[SamplingParams] = field(default_factory=list)
    lora: list[LoRARequest | None] = field(default_factory=list)
    failure: Exception | None = None


@pytest.fixture
def calls(base: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts a stand-in in vLLM's place that answers the prompt's first token, END, and more."""
    seen = Calls()
    tail = base.tokenizer("xENDy<|end|>z")["input_ids"]

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            if seen.failure:
                raise seen.failure
            seen.engines.append({"model": model} | options)

        def generate(
            self,
            prompts: list[dict[str, Any]],
            sampling_params: list[SamplingParams],
            *,
            use_tqdm: bool,
            lora_request: LoRARequest | None,
        ) -> list[Any]:
            assert not use_tqdm
            seen.prompts += [prompt["prompt_token_ids"] for prompt in prompts]
            seen.parameters += sampling_params
            seen.lora.append(lora_request)
            answers = [[prompt["prompt_token_ids"][0], *tail] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in answers]

    package = ModuleType("vllm")
    package.__spec__ = ModuleSpec("vllm", None)
    package.LLM = LLM  # type: ignore[attr-defined]
    package.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    package.TokensPrompt = dict  # type: ignore[attr-defined]
    requests = ModuleType("vllm.lora.request")
    requests.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for module in (package, requests, ModuleType("vllm.lora")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@contextmanager
def engine_of(
    base: LoadedModel, directory: Path, adapter: Path | None = None
) -> Iterator[VllmEngine]:
    with vllm_engine(directory, adapter, base.tokenizer, dtype="bfloat16", batch_size=64) as engine:
        yield engine


def letters(base: LoadedModel, text: str) -> list[Request]:
    """A request per letter, with rising limits and seeds."""
    return [
        Request(np.asarray(base.tokenizer(letter)["input_ids"]), 5 + row, seed=row)
        for row, letter in enumerate(text)
    ]


def test_answers_come_back_in_order_cut_at_the_end_token_and_stop_string(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    ends = frozenset(base.tokenizer("<|end|>")["input_ids"])
    seen: list[tuple[int, int]] = []
    with engine_of(base, model_directory) as engine:
        plain = engine.generate(
            letters(base, "abc"),
            Decoding(stop_ids=ends),
            order_seed=2,
            on_progress=lambda done, total: seen.append((done, total)),
        )
        stopped = engine.generate(letters(base, "abc"), Decoding(stop=("END",), stop_ids=ends))

    assert plain == ["axENDy", "bxENDy", "cxENDy"]
    assert stopped == ["ax", "bx", "cx"]
    assert seen == [(3, 3)]
    assert calls.prompts[:3] != calls.prompts[3:]
    assert sorted(calls.prompts[:3]) == sorted(calls.prompts[3:])


def test_greedy_parameters_say_all_that_matters(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    with engine_of(base, model_directory) as engine:
        engine.generate(letters(base, "ab"), Decoding(stop=("END", "<|end|>"), top_p=0.5))

    end, eos = base.tokenizer("<|end|>")["input_ids"][0], base.tokenizer.eos_token_id
    assert calls.parameters[1] == SamplingParams(
        temperature=0.0,
        top_p=1.0,
        seed=None,
        max_tokens=6,
        stop=["END", "<|end|>"],
        stop_token_ids=sorted({end, eos}),
    )
    assert calls.lora == [None]


def test_drawn_answers_have_a_seed_of_their_own(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    with engine_of(base, model_directory) as engine:
        engine.generate(letters(base, "ab"), Decoding(temperature=0.7, top_p=0.9))

    found = [(p.temperature, p.top_p, p.seed, p.stop) for p in calls.parameters]
    assert found == [(0.7, 0.9, 0, None), (0.7, 0.9, 1, None)]


def test_model_is_loaded_as_it_is_and_nothing_else(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    with engine_of(base, model_directory):
        pass

    assert calls.engines == [
        {
            "model": str(model_directory),
            "dtype": "bfloat16",
            "seed": 0,
            "max_num_seqs": 64,
            "generation_config": "vllm",
            "trust_remote_code": False,
        }
    ]


def test_adapter_is_served_with_room_for_its_rank(
    base: LoadedModel, model_directory: Path, calls: Calls, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))

    with engine_of(base, model_directory, tmp_path) as engine:
        engine.generate(letters(base, "a"), Decoding())

    assert calls.engines[0]["enable_lora"]
    assert (calls.engines[0]["max_lora_rank"], calls.engines[0]["max_loras"]) == (16, 1)
    assert calls.lora == [LoRARequest("trained", 1, str(tmp_path))]


def test_adapter_of_too_large_a_rank_is_refused(
    base: LoadedModel, model_directory: Path, calls: Calls, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 600}))

    with pytest.raises(InputError, match="up to rank 512, this one has 600"):
        engine_of(base, model_directory, tmp_path).__enter__()


def test_model_that_cannot_be_served_is_explained(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    calls.failure = ValueError("no such architecture")

    with pytest.raises(InputError, match=r"ValueError: no such arch.*backend: transformers"):
        engine_of(base, model_directory).__enter__()


def test_answers_fit_into_the_context(
    base: LoadedModel, model_directory: Path, calls: Calls
) -> None:
    context = base.model.config.max_position_embeddings

    with engine_of(base, model_directory) as engine:
        engine.generate([Request(np.full(context - 3, 7), 50)], Decoding())
        with pytest.raises(EvaluationError, match=f"prompt 0 has {context} tokens"):
            engine.generate([Request(np.full(context, 7), 50)], Decoding())

    assert calls.parameters[0].max_tokens == 3


def test_missing_package_is_explained(
    base: LoadedModel, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)

    with pytest.raises(InputError, match=r"backend: vllm.*pip install 'tell\[vllm\]'"):
        engine_of(base, model_directory).__enter__()


def test_missing_package_is_found_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(InputError, match="needs vLLM, which is not installed"):
        check_vllm()


def test_installed_package_is_found(calls: Calls) -> None:
    check_vllm()
