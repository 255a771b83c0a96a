"""Generation by vLLM (extra `vllm`), in place of `generation.generate`.

vLLM schedules prompts itself, so that batch size and order change which numbers are added up
first; `evaluation.num_repeats` measures what that does to the scores. Draws come from a random
stream per item here too, but not from the same one as in `generation`.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tell_core.errors import InputError
from tell_core.evaluation.extras import optional_module
from tell_core.evaluation.generation import (
    Counted,
    Decoding,
    Request,
    answer_text,
    end_token_ids,
    limits_in_context,
    special_stops,
)
from tell_core.store import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BACKEND = "`evaluation.backend: vllm`"
_INSTALL = "pip install 'tell[vllm]'"
# vllm.config.lora.MaxLoRARanks of vLLM 0.11 and later; the memory taken grows with it.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def check_vllm() -> None:
    """Know before anything is trained that vLLM is there, without importing it.

    Raises:
        InputError: It is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"{_BACKEND} needs vLLM, which is not installed; install it with `{_INSTALL}`, or use"
            " `backend: transformers`"
        )


class VllmEngine:
    """A model in vLLM, with or without an adapter.

    Args:
        vllm: The package.
        llm: Its engine.
        lora: The adapter's request, or None.
        tokenizer: Decodes the answers, as in `generation`.
        described: Has `config` and `generation_config` of the model.
    """

    def __init__(
        self,
        vllm: Any,
        llm: Any,
        lora: Any,
        tokenizer: PreTrainedTokenizerBase,
        described: Any,
    ) -> None:
        self._vllm = vllm
        self._llm = llm
        self._lora = lora
        self._tokenizer = tokenizer
        self._ends = end_token_ids(described, tokenizer)
        self._context = getattr(described.config, "max_position_embeddings", None)

    def close(self) -> None:
        """Let go of the engine, and of the GPU's memory with it."""
        self._llm = None
        gc.collect()
        torch.cuda.empty_cache()

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        *,
        order_seed: int | None = None,
        on_progress: Counted | None = None,
    ) -> list[str]:
        """As `generation.generate`; ``order_seed`` hands the prompts over in another order.

        Raises:
            EvaluationError: A prompt is empty, or fills the model's context.
            InputError: vLLM cannot apply the adapter.
        """
        limits = limits_in_context(requests, self._context)
        ends = self._ends | special_stops(self._tokenizer, decoding)
        order = list(range(len(requests)))
        if order_seed is not None:
            order = np.random.default_rng(order_seed).permutation(len(requests)).tolist()
        with _explained("vLLM cannot answer with this model or adapter"):
            outputs = self._llm.generate(
                [
                    self._vllm.TokensPrompt(prompt_token_ids=requests[row].prompt.tolist())
                    for row in order
                ],
                [self._parameters(requests[row], limits[row], decoding, ends) for row in order],
                use_tqdm=False,
                lora_request=self._lora,
            )
        texts = [""] * len(requests)
        for row, output in zip(order, outputs, strict=True):
            texts[row] = self._text(output.outputs[0].token_ids, ends, decoding)
        if on_progress:
            on_progress(len(requests), len(requests))
        return texts

    def _parameters(
        self, request: Request, limit: int, decoding: Decoding, ends: frozenset[int]
    ) -> Any:
        is_drawn = decoding.temperature > 0
        return self._vllm.SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p if is_drawn else 1.0,
            seed=request.seed if is_drawn else None,
            max_tokens=limit,
            stop=list(decoding.stop) or None,
            stop_token_ids=sorted(ends),
        )

    def _text(self, token_ids: Sequence[int], ends: frozenset[int], decoding: Decoding) -> str:
        """The answer's text; vLLM gives back the end token too."""
        places = [place for place, token in enumerate(token_ids) if token in ends]
        kept = token_ids[: places[0]] if places else token_ids
        return answer_text(self._tokenizer, kept, decoding.stop)


@contextmanager
def vllm_engine(
    directory: Path,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    batch_size: int,
) -> Iterator[VllmEngine]:
    """Load a model into vLLM, and give its memory back at the end.

    Nothing in the model's generation configuration but its end tokens has an effect. vLLM keeps an
    adapter in the number format of the model, where training computed with float32 adapters.

    Args:
        directory: The model; a fully trained one, or the base model of the adapter.
        adapter: Directory of a LoRA adapter, or None.
        tokenizer: Its tokenizer.
        dtype: Number format, such as ``bfloat16``.
        batch_size: Most prompts side by side.

    Raises:
        InputError: vLLM is not installed, or cannot serve the model or the adapter.
    """
    vllm = optional_module("vllm", _BACKEND, _INSTALL)
    options: dict[str, Any] = {}
    lora: Any = None
    if adapter is not None:
        options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(adapter)}
        requests = optional_module("vllm.lora.request", _BACKEND, _INSTALL)
        lora = requests.LoRARequest(lora_name="trained", lora_int_id=1, lora_path=str(adapter))
    with _explained(f"vLLM cannot serve the model in {directory}"):
        engine = VllmEngine(
            vllm,
            vllm.LLM(
                model=str(directory),
                dtype=dtype,
                seed=0,
                max_num_seqs=batch_size,
                generation_config="vllm",
                trust_remote_code=False,
                **options,
            ),
            lora,
            tokenizer,
            _described(directory),
        )
    try:
        yield engine
    finally:
        engine.close()


def _lora_rank(adapter: Path) -> int:
    """The smallest rank that vLLM has room for and the adapter fits into."""
    rank = int(read_json(adapter / "adapter_config.json")["r"])
    fitting = [size for size in _LORA_RANKS if size >= rank]
    if not fitting:
        raise InputError(
            f"{_BACKEND} serves adapters up to rank {_LORA_RANKS[-1]}, this one has {rank}; use"
            " `backend: transformers`, or a smaller `training.lora_rank`"
        )
    return fitting[0]


def _described(directory: Path) -> Any:
    """Configuration and generation configuration of a model, without its weights."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    has_file = (directory / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(directory) if has_file else None
    return SimpleNamespace(config=config, generation_config=generation)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever vLLM raises into an InputError; which type that is, is up to its parts."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{what} ({type(error).__name__}: {error}); use `evaluation.backend: transformers`"
        ) from error
