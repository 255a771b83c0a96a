"""The model that is looked at: a model directory, or what a cell of a run left behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tell_core.training.devices import resolve_device
from tell_core.training.models import full_model, load_model, load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_subject(
    model_path: str,
    *,
    revision: str | None = None,
    trained: Path | None = None,
    device: torch.device | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model in float32, adapters merged into its weights, and its tokenizer.

    Gradients are taken by the merged base weights: at the start of a training half of the
    adapters' own gradients vanish, and their directions mean nothing from one adapter to the next.

    Args:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        trained: Directory of a train stage, or None for the base model itself.
        device: Where to compute; a GPU by default when there is one.

    Raises:
        ModelError: A model or adapter is missing or damaged.
    """
    from peft import PeftModel

    device = device or resolve_device()
    full = full_model(trained) if trained else None
    loaded = load_model(
        str(full or model_path),
        revision=None if full else revision,
        dtype="float32",
        device=device,
    )
    model: nn.Module = loaded.model
    if trained is not None and full is None:
        adapted = load_trained(loaded, trained)
        model = cast("Any", adapted).merge_and_unload() if isinstance(adapted, PeftModel) else model
    return model.eval(), loaded.tokenizer
