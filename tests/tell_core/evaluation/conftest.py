"""A tiny random model with a byte-level tokenizer, and the inputs of one cell for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tell_core.data.encoding import EncodedExamples, concatenate, from_lists
from tell_core.training.models import LoadedModel
from tests.tell_core.training.random_models import create_model_from_config

END_OF_TURN = "<|end|>"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, an end-of-text and an end-of-turn token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens([AddedToken(END_OF_TURN, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|eos|>")


@pytest.fixture(scope="session")
def base(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """A random two-layer model with peaked outputs; tests must leave it as it is."""
    loaded = create_model_from_config(
        tokenizer,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_tokens=256,
        seed=0,
    )
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return loaded


@pytest.fixture(scope="session")
def model_directory(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def write_inputs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Writes a mix directory with the given test items, two general items, and a retention set."""

    def encode(rows: list[dict[str, Any]], *, is_task: bool) -> EncodedExamples:
        pairs = [(row["prompt"] + "\n", row["reference"] + END_OF_TURN) for row in rows]
        ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in pairs]
        return from_lists([(prompt + answer, len(prompt)) for prompt, answer in ids], is_task)

    def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def of_role(role: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            {
                "item_id": name, "role": role, "prompt_digest": name, "prompt": name,
                "reference": name, "extra": {},
            }
            for name in names
        ]  # fmt: skip

    def write(items: list[dict[str, Any]], retention: tuple[str, ...] = ()) -> Path:
        defaults = {"role": "task", "extra": {}}
        rows = [defaults | {"prompt_digest": f"digest-{row['item_id']}"} | row for row in items]
        others = of_role("general", ("general-0", "general-1")) + of_role("retention", retention)
        directory = tmp_path / "inputs"
        directory.mkdir()
        tests = encode(rows, is_task=True)
        tests.save(directory / "test.safetensors")
        write_lines(directory / "items.jsonl", rows)
        probe = concatenate([tests.select(np.arange(1)), encode(others, is_task=False)])
        probe.save(directory / "probe.safetensors")
        write_lines(directory / "probe_items.jsonl", [rows[0], *others])
        return directory

    return write
