"""Base models: loading, digests, random initialisation, adapters, saving what was trained."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tell_core.errors import ModelError
from tell_core.spec.identity import file_digest
from tell_core.spec.model import TrainingSpec
from tell_core.store import read_json, write_json
from tell_core.training.devices import DtypeName, resolve_device, resolve_precision

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_DIRECTORY = "adapter"
MODEL_DIRECTORY = "model"
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory.

    Attributes:
        model: The causal language model, on its device, in evaluation mode.
        tokenizer: Its tokenizer.
        id: Directory or hub id it came from.
        digest: sha256 of configuration and weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    digest: str


def resolve_model(model_id: str, revision: str | None = None) -> Path:
    """The local directory of a model; a hub id is downloaded once, safetensors only.

    Raises:
        ModelError: There is no such directory and the hub does not have it, or is out of reach.
    """
    directory = Path(model_id).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(f"{directory} has no config.json; needed: a Hugging Face model")
        return directory
    if model_id.count("/") > 1 or model_id.startswith((".", "/", "~")):
        raise ModelError(f"there is no model directory {directory}; {_how_to_get_a_model()}")
    return _download_model(model_id, revision)


def _download_model(model_id: str, revision: str | None) -> Path:
    """The hub's files of a model, from the local cache when offline."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(model_id, revision=revision, allow_patterns=list(_MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        how = "in the local cache (offline)" if constants.HF_HUB_OFFLINE else "on the hub"
        raise ModelError(
            f"model {model_id!r} was not found: tried the directory {Path(model_id).absolute()}"
            f" and the Hugging Face id {model_id!r}, revision {revision or 'default'}, {how}"
            f" ({type(error).__name__}); {_how_to_get_a_model()}"
        ) from error
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"the hub's {model_id!r} has no config.json; it is not a model")
    return Path(path)


def _how_to_get_a_model() -> str:
    return "check the spelling, or run `tell fetch-model` and name the directory it writes"


def model_digest(directory: Path) -> str:
    """sha256 over the configuration and every safetensors file of a model directory.

    Raises:
        ModelError: The directory holds no safetensors files; pickled weights are never read.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{directory} has no .safetensors file; weights in other formats are not loaded,"
            " save the model again with `save_pretrained`"
        )
    digest = hashlib.sha256()
    for path in [directory / "config.json", *weights]:
        digest.update(f"{path.name}:{file_digest(path)};".encode())
    return digest.hexdigest()


def load_tokenizer(model_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id.

    Raises:
        ModelError: The model cannot be found or has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    directory = resolve_model(model_id, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {error}") from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: DtypeName = "auto",
    device: torch.device | None = None,
    is_full: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        model_id: Directory or hub id.
        revision: Commit, tag or branch on the hub.
        dtype: Number format of the weights; see `devices.resolve_precision`.
        device: Where to put it; by default a GPU when there is one.
        is_full: Whether all weights will be trained, which keeps them in float32.

    Raises:
        ModelError: It cannot be found, is no causal language model, or needs code of its own.
    """
    from transformers import AutoModelForCausalLM

    directory = resolve_model(model_id, revision)
    device = device or resolve_device()
    precision = resolve_precision(dtype, device, "full" if is_full else "lora")
    digest = model_digest(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=precision.weights, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the model in {directory} cannot be loaded: {error}") from error
    tokenizer = load_tokenizer(str(directory))
    return LoadedModel(_ready(model, device), tokenizer, model_id, digest)


def create_model_from_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_tokens: int,
    seed: int,
    device: torch.device | None = None,
) -> LoadedModel:
    """A small Llama-architecture model with random weights, for pre-training from scratch.

    Input and output embeddings are one matrix. Equal arguments give equal weights.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: Width, a multiple of twice ``num_heads``.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        intermediate_size: Width of the feed-forward layers.
        max_tokens: Longest sequence.
        seed: Seed of the weights.
        device: Where to put it; by default the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    digest = hashlib.sha256(config.to_json_string().encode() + f";seed {seed}".encode())
    placed = _ready(model, device or torch.device("cpu"))
    return LoadedModel(placed, tokenizer, "random", digest.hexdigest())


def _ready(model: nn.Module, device: torch.device) -> PreTrainedModel:
    """``model`` on its device, in evaluation mode."""
    return cast("PreTrainedModel", nn.Module.to(model, device).eval())


def attach_lora(model: PreTrainedModel, training: TrainingSpec) -> PeftModel:
    """Put low-rank adapters (float32) into ``model``, in place, and freeze everything else.

    Their initial weights come from torch's current random state: seed it first.

    Raises:
        ModelError: ``lora_targets`` names modules that the model does not have.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = training.lora_targets
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=training.lora_rank,
        lora_alpha=cast(int, training.lora_alpha),
        lora_dropout=training.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        with _quiet_peft():
            return cast("PeftModel", get_peft_model(model, config))
    except ValueError as error:
        raise ModelError(
            f"lora_targets {targets!r} does not fit this model: {error}; use all-linear or names"
            f" among {', '.join(_linear_names(model))}"
        ) from error


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hide that peft 0.21 asks transformers 5.23 for an attribute by its deprecated name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _linear_names(model: nn.Module) -> list[str]:
    """Last name parts of the model's linear layers."""
    modules = model.named_modules()
    return sorted({name.split(".")[-1] for name, m in modules if isinstance(m, nn.Linear)})


def save_trained(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write ``out/adapter`` (LoRA) or ``out/model`` (full), complete or not at all.

    What an earlier training left there is replaced.
    The full model is written in float32, as it was trained, with its tokenizer.
    """
    from peft import PeftModel

    is_lora = isinstance(model, PeftModel)
    final = out / (ADAPTER_DIRECTORY if is_lora else MODEL_DIRECTORY)
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    cast("Any", model).save_pretrained(partial)
    if is_lora:
        _settle_adapter(partial)
    else:
        tokenizer.save_pretrained(partial)
    for name in (ADAPTER_DIRECTORY, MODEL_DIRECTORY):
        shutil.rmtree(out / name, ignore_errors=True)
    partial.rename(final)


def _settle_adapter(directory: Path) -> None:
    """Make the adapter's files equal for equal trainings: no model card, sorted module names."""
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = read_json(path)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    write_json(path, dict(sorted(config.items())))


def load_trained(base: LoadedModel, directory: Path) -> PreTrainedModel | PeftModel:
    """The model that a training left in ``directory``, in evaluation mode.

    Adapters are attached to ``base.model`` in place; take them off again with `detach_adapter`.
    A fully trained model is loaded beside it, on the same device.

    Raises:
        ModelError: ``directory`` holds neither adapter/ nor model/.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = base.model.device
    if (directory / ADAPTER_DIRECTORY).is_dir():
        adapter = str(directory / ADAPTER_DIRECTORY)
        with _quiet_peft():
            model = PeftModel.from_pretrained(base.model, adapter, torch_device=str(device))
        return model.eval()
    if not (directory / MODEL_DIRECTORY).is_dir():
        raise ModelError(f"{directory} holds neither adapter/ nor model/; train the cell again")
    trained = AutoModelForCausalLM.from_pretrained(
        directory / MODEL_DIRECTORY, dtype=base.model.dtype, use_safetensors=True
    )
    return _ready(trained, device)


def detach_adapter(model: nn.Module) -> None:
    """Take the adapters off the base model again; nothing to do for a full model."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        cast("Any", model).unload()
