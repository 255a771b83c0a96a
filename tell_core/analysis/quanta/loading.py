"""What is looked at: a model, or what a cell of a run left behind, and examples from files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, from_lists
from tell_core.data.reading import read_source
from tell_core.data.rendering import ChatRenderer, Example
from tell_core.data.seeding import seeded_generator
from tell_core.data.sources import resolve_source
from tell_core.data.workspace import open_workspace
from tell_core.errors import DataError
from tell_core.spec.model import SourceSpec
from tell_core.training.devices import resolve_device
from tell_core.training.models import full_model, load_model, load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Examples are rendered in this many at a time until there are enough.
_RENDERED_AT_ONCE = 1000


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


def read_examples(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    limit: int,
    seed: int = 0,
) -> EncodedExamples:
    """A seeded choice of the prompt-response pairs of some files, rendered for a model.

    Args:
        files: Files, directories or globs, in any format that a specification takes.
        tokenizer: Tokenizer of the model; its chat template, or the plainest one.
        max_tokens: Longer examples are passed over.
        limit: Most examples.
        seed: Seed of the choice.

    Raises:
        DataError: A file cannot be read, or no example is short enough.
    """
    rows = _read_pairs(files)
    order = seeded_generator(seed, "quanta examples").permutation(len(rows)).tolist()
    renderer = ChatRenderer(tokenizer)
    kept: list[tuple[list[int], int]] = []
    while order and len(kept) < limit:
        part, order = order[:_RENDERED_AT_ONCE], order[_RENDERED_AT_ONCE:]
        kept += [
            (tokens, start)
            for tokens, start in renderer.encode([rows[place] for place in part])
            if start < len(tokens) <= max_tokens
        ]
    if not kept:
        raise DataError(
            f"none of {len(rows)} examples in {', '.join(files)} has at most {max_tokens} tokens;"
            " give shorter ones, or a higher limit"
        )
    return from_lists(kept[:limit], is_task=False)


def _read_pairs(files: Sequence[str]) -> list[Example]:
    with tempfile.TemporaryDirectory() as directory, open_workspace(Path(directory)) as connection:
        for number, path in enumerate(files):
            source = resolve_source(SourceSpec(path=path), "general", path)
            read_source(connection, source, number)
        found = connection.execute("select prompt, response, system from examples order by id")
        return [Example(*row) for row in found.fetchall()]
