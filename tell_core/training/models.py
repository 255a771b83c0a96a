"""Base models: loading, digests, adapters, saving and loading what was trained."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tell_core.errors import ModelError
from tell_core.spec.identity import file_digest
from tell_core.store import read_json, sync_below, sync_path, write_json
from tell_core.training.devices import DtypeName, resolve_device, resolve_precision
from tell_core.trusted_code import brings_code, code_files, may_run_code

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tell_core.spec.model import TrainingSpec

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
        digest: `model_digest` of the directory it came from.
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


def fetch_with_code(model_id: str, revision: str | None) -> Path:
    """`resolve_model`, with the code that one commit of a model brings, to be read and allowed.

    Raises:
        ModelError: A hub id comes without the full hash of a commit, or as `resolve_model`.
    """
    if Path(model_id).expanduser().is_dir():
        return resolve_model(model_id)
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ModelError(
            f"--revision {revision or 'is missing'}: code is allowed for one commit of {model_id};"
            " give its full hash of 40 digits (branches and tags move)"
        )
    return _download_model(model_id, revision, (*_MODEL_FILES, "*.py"))


def _download_model(
    model_id: str, revision: str | None, files: Sequence[str] = _MODEL_FILES
) -> Path:
    """The hub's files of a model, from the local cache when offline."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(model_id, revision=revision, allow_patterns=list(files))
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
    """sha256 over the configurations and every safetensors file of a model directory.

    The generation configuration counts where there is one: its end tokens decide where answers
    stop; so does code of the model's own where it is allowed to run. Files are read once per
    process as long as inode, time and size stay the same.

    Raises:
        ModelError: The directory holds no safetensors files; pickled weights are never read.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{directory} has no .safetensors file; weights in other formats are not loaded,"
            " save the model again with `save_pretrained`"
        )
    generation = directory / "generation_config.json"
    described = [directory / "config.json", *([generation] if generation.is_file() else [])]
    if may_run_code(directory):
        described += [directory / name for name in code_files(directory)]
    return _digest_of(tuple(_look(path) for path in [*described, *weights]))


def _look(path: Path) -> tuple[Path, int, int, int]:
    """What changes when a file is replaced: its inode, time of change in ns, size in bytes."""
    status = path.stat()
    return path.absolute(), status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _digest_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(f"{path.name}:{file_digest(path)};".encode())
    return digest.hexdigest()


def check_weights(directory: Path) -> None:
    """See that every safetensors file of a directory can be read; only headers and sizes are.

    Raises:
        ModelError: A file is cut short, or is no safetensors file.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged, or was not copied whole ({error}); fetch or save the model"
                " again"
            ) from error


def context_tokens(model_id: str, revision: str | None = None) -> int | None:
    """Longest sequence that a model takes, in tokens; None when it has no limit.

    Reads the configuration only, not the weights.

    Raises:
        ModelError: The model cannot be found, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    directory = resolve_model(model_id, revision)
    with _explained(f"the configuration {directory / 'config.json'}", directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=may_run_code(directory))
    return getattr(config, "max_position_embeddings", None)


def skeleton(model_id: str, revision: str | None = None) -> PreTrainedModel:
    """A model as its code builds it, without weights: only the configuration is read.

    Raises:
        ModelError: The model cannot be found, or is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = resolve_model(model_id, revision)
    allowed = may_run_code(directory)
    with _explained(f"the configuration {directory / 'config.json'}", directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=allowed)
        with torch.device("meta"):
            model = cast("Any", AutoModelForCausalLM).from_config(config, trust_remote_code=allowed)
    return cast("PreTrainedModel", model)


@contextmanager
def _explained(what: str, directory: Path | None = None) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or peft raise on a bad file into a ModelError.

    Which type they raise is up to their parsers: tokenizers raises plain `Exception`.

    Args:
        what: What is loaded, in words.
        directory: Where the model lies, if it may bring code of its own.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        mend = "if a file was damaged or not copied whole, fetch or save the model again"
        if directory and brings_code(directory) and not may_run_code(directory):
            mend = (
                "it brings code of its own, which is not run before you have read and allowed it"
                f" (`tell trust add {directory}`)"
            )
        raise ModelError(
            f"{what} cannot be loaded ({type(error).__name__}: {error}); {mend}"
        ) from error


def load_tokenizer(model_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id.

    Raises:
        ModelError: The model cannot be found or has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    directory = resolve_model(model_id, revision)
    files = "tokenizer.json, tokenizer_config.json"
    with _explained(f"the tokenizer in {directory} ({files})", directory):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=may_run_code(directory)
        )
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
        ModelError: It cannot be found, is no causal language model, needs code of its own, or one
            of its files is damaged.
    """
    from transformers import AutoModelForCausalLM

    directory = resolve_model(model_id, revision)
    device = device or resolve_device()
    precision = resolve_precision(dtype, device, "full" if is_full else "lora")
    digest = model_digest(directory)
    check_weights(directory)
    with _explained(f"the model in {directory}", directory):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=precision.weights, use_safetensors=True,
            trust_remote_code=may_run_code(directory),
        )  # fmt: skip
    tokenizer = load_tokenizer(str(directory))
    return LoadedModel(_ready(model, device), tokenizer, model_id, digest)


def load_quantized(model_id: str, *, revision: str | None, device: torch.device) -> LoadedModel:
    """`load_model` with the linear layers' weights in 4 bits (nf4 with double quantization).

    For training adapters only; products are computed in bfloat16 (QLoRA, arXiv 2305.14314).
    Evaluation loads the base in its own format.

    Raises:
        ModelError: There is no CUDA GPU or no bitsandbytes, or as `load_model`.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        raise ModelError(
            f"training.weight_quantization: nf4 was asked for on {device.type}"
            f" ({'with' if find_spec('bitsandbytes') else 'without'} bitsandbytes); it needs a CUDA"
            " GPU and `pip install 'tell[gpu]'`; leave it at none otherwise"
        )
    directory = resolve_model(model_id, revision)
    digest = model_digest(directory)
    check_weights(directory)
    quantization = cast("Any", BitsAndBytesConfig)(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    with _explained(f"the model in {directory}", directory):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, quantization_config=quantization,
            device_map={"": device}, use_safetensors=True,
            trust_remote_code=may_run_code(directory),
        )  # fmt: skip
    return LoadedModel(nn.Module.eval(model), load_tokenizer(str(directory)), model_id, digest)


def shared_model(
    model_id: str, *, revision: str | None, dtype: DtypeName, device: torch.device
) -> LoadedModel:
    """`load_model`, the last one kept in memory for the next cells of this process.

    Adapters are attached and detached in place; whoever uses it leaves it as it was. It is loaded
    anew when its files have changed.
    """
    directory = resolve_model(model_id, revision)
    return _kept(directory, dtype, device, model_digest(directory))


@lru_cache(maxsize=1)
def _kept(directory: Path, dtype: DtypeName, device: torch.device, digest: str) -> LoadedModel:
    loaded = load_model(str(directory), dtype=dtype, device=device)
    if loaded.digest != digest:
        raise ModelError(f"{directory} changed while it was loaded; run again")
    return loaded


def _ready(model: nn.Module, device: torch.device) -> PreTrainedModel:
    """``model`` on its device, in evaluation mode."""
    return cast("PreTrainedModel", nn.Module.to(model, device).eval())


def attach_lora(model: PreTrainedModel, training: TrainingSpec) -> PeftModel:
    """Put low-rank adapters (float32) into ``model``, in place, and freeze everything else.

    Their initial weights come from torch's current random state: seed it first. The experts of a
    mixture-of-experts layer, whose weights are one tensor, get an adapter each; its router gets one
    where peft knows the family.

    Raises:
        ModelError: ``lora_targets`` names modules that the model does not have, or there is to be
            dropout before adapters of experts.
    """
    from peft import get_peft_model

    targets = training.lora_targets
    try:
        with _quiet_peft():
            return cast("PeftModel", get_peft_model(model, _lora_config(model, training)))
    except ValueError as error:
        raise ModelError(
            f"lora_targets {targets!r} does not fit this model: {error}; use all-linear or names"
            f" among {', '.join(_linear_names(model))}"
        ) from error


def _lora_config(model: PreTrainedModel, training: TrainingSpec) -> LoraConfig:
    from peft import LoraConfig, TaskType

    modules, experts = _lora_targets(model, training.lora_targets)
    if experts and training.lora_dropout:
        raise ModelError(
            f"training.lora_dropout is {training.lora_dropout}, but the experts of this"
            f" {model.config.model_type} model ({', '.join(experts)}) are one tensor per layer, and"
            " adapters of such tensors have no input of their own to drop out; set it to 0, or"
            " leave the experts out of lora_targets"
        )
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=training.lora_rank,
        lora_alpha=cast(int, training.lora_alpha),
        lora_dropout=training.lora_dropout,
        target_modules=modules,
        target_parameters=experts or None,
    )


def _lora_targets(
    model: nn.Module, targets: str | Sequence[str]
) -> tuple[str | list[str] | None, list[str]]:
    """Modules that get adapters, as peft takes them, and tensors of experts that do.

    ``all-linear`` of peft means modules; the tensors of experts it finds in a few families only.
    """
    stacked = stacked_weights(model)
    if isinstance(targets, str):
        return targets, stacked
    experts = [name for name in targets if any(f".{one}".endswith(f".{name}") for one in stacked)]
    return [name for name in targets if name not in experts] or None, experts


def stacked_weights(model: nn.Module) -> list[str]:
    """Last two name parts of weights that are a stack of matrices, one for each expert."""
    return sorted(
        {
            ".".join(name.split(".")[-2:])
            for name, weight in model.named_parameters()
            if is_stack_of_experts(weight) and "lora_" not in name
        }
    )


def is_stack_of_experts(weight: torch.Tensor) -> bool:
    """Whether it has shape (experts, rows, columns); kernels of convolutions have a side of 1."""
    return weight.ndim == 3 and min(weight.shape) > 1


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Hide two warnings of peft 0.21 that no user can act on.

    It asks transformers 5.23 for an attribute by its deprecated name; and it calls ignored the rank
    that it gives to fused tensors of experts, because it looks for them among modules.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
        yield


def _linear_names(model: nn.Module) -> list[str]:
    """Last name parts of the model's linear layers, and the tensors of its experts."""
    modules = model.named_modules()
    linear = {name.split(".")[-1] for name, m in modules if isinstance(m, nn.Linear)}
    return sorted(linear) + stacked_weights(model)


@contextmanager
def checkpointed(model: nn.Module, training: TrainingSpec) -> Iterator[None]:
    """Keep activations at the borders of layers only, if so wished, then all of them again.

    Raises:
        ModelError: The model cannot do it.
    """
    if not training.gradient_checkpointing:
        yield
        return
    switched = cast("Any", model)
    try:
        switched.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"this {switched.config.model_type} model does not support training."
            f"gradient_checkpointing ({error}); leave it off"
        ) from error
    try:
        yield
    finally:
        switched.gradient_checkpointing_disable()


def save_trained(model: nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write ``out/adapter`` (LoRA) or ``out/model`` (full), on disk complete or not at all.

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
        _settle_tokenizer(partial)
    for name in (ADAPTER_DIRECTORY, MODEL_DIRECTORY):
        shutil.rmtree(out / name, ignore_errors=True)
    sync_below(partial)
    partial.rename(final)
    sync_path(out)


def _settle_adapter(directory: Path) -> None:
    """Make the adapter's files equal for equal trainings: no model card, sorted module names."""
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = read_json(path)
    for name in ("target_modules", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name].sort()
    write_json(path, dict(sorted(config.items())))


def _settle_tokenizer(directory: Path) -> None:
    """Make the tokenizer's files equal for equal trainings: forget whether the hub was off."""
    path = directory / "tokenizer_config.json"
    config = read_json(path)
    config.pop("local_files_only", None)
    write_json(path, config)


def full_model(directory: Path) -> Path | None:
    """The model directory of a full training, complete in itself; None for adapters.

    Raises:
        ModelError: ``directory`` holds neither adapter/ nor model/.
    """
    if (directory / ADAPTER_DIRECTORY).is_dir():
        return None
    if not (directory / MODEL_DIRECTORY).is_dir():
        raise ModelError(f"{directory} holds neither adapter/ nor model/; train the cell again")
    return directory / MODEL_DIRECTORY


def load_trained(base: LoadedModel, directory: Path) -> PreTrainedModel | PeftModel:
    """The model that a training left in ``directory``, in evaluation mode.

    Adapters are attached to ``base.model`` in place; take them off again with `detach_adapter`.
    A fully trained model is loaded beside it, on the same device, in float32 as it was trained.

    Raises:
        ModelError: ``directory`` holds neither adapter/ nor model/, or a file is damaged.
    """
    from peft import PeftModel

    device = base.model.device
    trained = full_model(directory)
    if trained is not None:
        return load_model(str(trained), device=device, is_full=True).model
    adapter = directory / ADAPTER_DIRECTORY
    if not any(adapter.glob("*.safetensors")):  # peft would unpickle adapter_model.bin instead
        raise ModelError(f"{adapter} has no .safetensors file; train the cell again")
    check_weights(adapter)
    with _explained(f"the adapter in {adapter}"), _quiet_peft():
        model = PeftModel.from_pretrained(base.model, adapter, torch_device=str(device))
    return model.eval()


def detach_adapter(model: nn.Module) -> None:
    """Take the adapters off the base model again; nothing to do for a full model."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        cast("Any", model).unload()
