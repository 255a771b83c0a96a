"""The model that is evaluated: base model and what was trained, in memory or in vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tell_core.evaluation.vllm_backend import VllmEngine, vllm_engine
from tell_core.training.devices import DtypeName, Precision, resolve_precision
from tell_core.training.models import (
    ADAPTER_DIRECTORY,
    LoadedModel,
    detach_adapter,
    full_model,
    load_model,
    load_tokenizer,
    load_trained,
    resolve_model,
    shared_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a base model, with or without what was trained.

    Attributes:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        trained: Directory of the train stage, or None.
        dtype: Number format as in the specification.
        device: Where to compute.
        loaded: The base model when it is in memory already.
    """

    model_path: str
    revision: str | None
    trained: Path | None
    dtype: DtypeName
    device: torch.device
    loaded: LoadedModel | None

    @property
    def full(self) -> Path | None:
        """Directory of the fully trained model, or None."""
        return full_model(self.trained) if self.trained else None

    @property
    def adapter(self) -> Path | None:
        """Directory of the train stage where it holds an adapter, or None."""
        return None if self.full else self.trained

    @property
    def precision(self) -> Precision:
        """Number formats; fully trained weights stay in float32."""
        return resolve_precision(self.dtype, self.device, "full" if self.full else "lora")

    @contextmanager
    def in_memory(self) -> Iterator[tuple[nn.Module, PreTrainedTokenizerBase]]:
        """Model and tokenizer, ready to compute; the base model is left as it was."""
        if self.full:
            base = load_model(str(self.full), dtype=self.dtype, device=self.device, is_full=True)
        else:
            base = self.loaded or shared_model(
                self.model_path, revision=self.revision, dtype=self.dtype, device=self.device
            )
        with _adapted(base, self.adapter) as model, self.precision.autocast(self.device):
            yield model, base.tokenizer

    @contextmanager
    def in_vllm(self, batch_size: int) -> Iterator[tuple[VllmEngine, PreTrainedTokenizerBase]]:
        """The same in vLLM.

        Raises:
            InputError: vLLM is not installed, or cannot serve it.
        """
        directory = self.full or resolve_model(self.model_path, self.revision)
        adapter = self.adapter / ADAPTER_DIRECTORY if self.adapter else None
        tokenizer = load_tokenizer(str(directory))
        with vllm_engine(
            directory, adapter, tokenizer, dtype=self.precision.name, batch_size=batch_size
        ) as engine:
            yield engine, tokenizer


@contextmanager
def _adapted(base: LoadedModel, trained: Path | None) -> Iterator[nn.Module]:
    if trained is None:
        yield base.model
        return
    model = load_trained(base, trained)
    try:
        yield model
    finally:
        detach_adapter(model)
