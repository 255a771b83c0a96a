"""The embedded world as a stage: its data, and a base model pre-trained on its single skills."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from tell_core.data.encoding import Mixture, from_lists
from tell_core.data.orders import build_order
from tell_core.data.rendering import ChatRenderer, Example
from tell_core.data.small_world import WorldSize, write_world
from tell_core.pipeline import Progress, Stage, per_step
from tell_core.spec.identity import fingerprint
from tell_core.spec.model import TrainingSpec
from tell_core.store import find_stage, write_stage
from tell_core.training.loop import train_cell
from tell_core.training.models import load_tokenizer

_VERSION = 1
_SEED = 0
SIZE = WorldSize()
# In forward passes of a size that no default moves: other passes round otherwise, and with another
# base model every number of the demo would be another.
PRETRAINING = TrainingSpec(
    method="full",
    learning_rate=2e-3,
    epochs=2,
    batch_size=32,
    micro_batch_tokens=4096,
    keep="last",
    num_probes=2,
)


def world_stage(root: Path, on_progress: Progress | None = None) -> Stage:
    """Write the world's data and pre-train its base model; an interrupted training goes on.

    The stage holds ``task_train.jsonl``, ``task_test.jsonl``, ``general.jsonl``, ``quanta.json``
    and the base model in ``base/model``.
    """
    is_there = find_world(root) is not None
    if not is_there:
        with write_stage(root, "world", _identity(), resume=True) as out:
            _write(out, on_progress)
    return Stage("world", _identity(), root, reused=is_there)


def find_world(root: Path) -> Path | None:
    """The finished stage, or None."""
    return find_stage(root, "world", _identity())


def _identity() -> str:
    return fingerprint("world", _VERSION, asdict(SIZE), PRETRAINING, _SEED)


def _write(out: Path, on_progress: Progress | None) -> None:
    paths = write_world(out, SIZE, seed=_SEED)
    _initialise(paths["base_init"])
    inputs = out / "pretrain"
    inputs.mkdir(exist_ok=True)
    _mixture(paths["pretrain"], paths["base_init"]).save(inputs / "mixture.safetensors")
    train_cell(
        model_path=str(paths["base_init"]),
        revision=None,
        inputs=inputs,
        training=PRETRAINING,
        seed=_SEED,
        out=out / "base",
        on_progress=per_step("pre-training the base model", on_progress),
    )


def _initialise(directory: Path) -> None:
    """Give the base model its random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory))
    model.save_pretrained(directory)


def _mixture(data: Path, tokenizer_path: Path) -> Mixture:
    renderer = ChatRenderer(load_tokenizer(str(tokenizer_path)))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    encoded = renderer.encode([Example(row["prompt"], row["response"]) for row in rows])
    order = build_order("shuffle", 0, len(rows), PRETRAINING.num_epochs, _SEED)
    return Mixture(from_lists(encoded, is_task=False), order)
