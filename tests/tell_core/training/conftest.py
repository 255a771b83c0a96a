"""A tiny model on disk, and mixtures of random tokens for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tell_core.data.encoding import EncodedExamples, Mixture, concatenate, from_lists
from tell_core.spec.model import TrainingSpec
from tell_core.training.models import LoadedModel
from tests.tell_core.training.random_models import create_model_from_config

VOCAB_SIZE = 61
MAX_TOKENS = 64


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{index}": index for index in range(VOCAB_SIZE)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", unk_token="t0")


@pytest.fixture(scope="session")
def base(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """A random two-layer model; tests must leave it as it is."""
    return create_model_from_config(
        tokenizer,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_tokens=MAX_TOKENS,
        seed=0,
    )


@pytest.fixture(scope="session")
def model_directory(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)
    return directory


def _random_examples(num_task: int, num_general: int, seed: int = 0) -> EncodedExamples:
    """Examples of 6 to 20 random tokens, task examples first."""
    generator = np.random.default_rng(seed)

    def draw(count: int) -> list[tuple[list[int], int]]:
        lengths = generator.integers(6, 21, size=count)
        starts = [int(generator.integers(1, length)) for length in lengths]
        tokens = [generator.integers(2, VOCAB_SIZE, size=length).tolist() for length in lengths]
        return list(zip(tokens, starts, strict=True))

    return concatenate([from_lists(draw(num_task), True), from_lists(draw(num_general), False)])


@pytest.fixture(scope="session")
def random_examples() -> Callable[..., EncodedExamples]:
    """Draws examples: (number of task, number of general examples, seed)."""
    return _random_examples


@pytest.fixture
def write_inputs(tmp_path: Path) -> Callable[..., Path]:
    """Writes a mixture of 8 task and 16 general examples and a probe set of 3 + 2."""

    def write(name: str = "inputs", epochs: int = 2, seed: int = 0) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        examples = _random_examples(8, 16, seed)
        generator = np.random.default_rng(seed)
        order = np.concatenate([generator.permutation(len(examples)) for _ in range(epochs)])
        Mixture(examples, order.astype(np.int32)).save(directory / "mixture.safetensors")
        _random_examples(3, 2, seed + 1).save(directory / "probe.safetensors")
        return directory

    return write


@pytest.fixture(scope="session")
def training_spec() -> Callable[..., TrainingSpec]:
    """Makes settings of a short training; keyword arguments replace single ones."""
    return _training_spec


def _training_spec(**changes: object) -> TrainingSpec:
    settings: dict[str, object] = {
        "learning_rate": 3e-3,
        "epochs": 2,
        "batch_size": 4,
        "num_probes": 5,
        "keep": "last",
        "lora_rank": 2,
        "device": "cpu",
    }
    return TrainingSpec.model_validate(settings | changes)
