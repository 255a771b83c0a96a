"""Train one cell: from a base model and a mixture on disk to trained weights, log and summary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, Mixture, from_lists
from tell_core.data.token_store import open_mixture
from tell_core.errors import DataError, SpecError
from tell_core.spec.identity import file_digest, fingerprint
from tell_core.store import explain_disk_errors, read_json, sync_below, sync_path, write_json
from tell_core.training import devices, models
from tell_core.training.attention import attention_name
from tell_core.training.checkpoints import remove_checkpoints
from tell_core.training.collation import check_examples
from tell_core.training.identity import training_fields
from tell_core.training.probes import save_probe
from tell_core.training.ranks import check_ranks, helper_arguments, open_ranks
from tell_core.training.trainer import (
    DivergedError,
    OnProgress,
    Trainer,
    checkpoint_directory,
    seed_step,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tell_core.spec.model import TrainingSpec

PROBE_FILE = "probe.safetensors"
PROBE_LOSSES_FILE = "probe.npz"
SUMMARY_FILE = "summary.json"
_SHOWN_EXAMPLES = 3
_SHOWN_TOKENS = 24


def train_cell(
    *,
    model_path: str,
    revision: str | None,
    inputs: Path,
    training: TrainingSpec,
    seed: int,
    out: Path,
    dtype: devices.DtypeName = "auto",
    loaded: models.LoadedModel | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train one cell and write adapter/ or model/, log.jsonl, probe.npz and summary.json.

    Called again on the same ``out`` after an interruption it goes on from the last checkpoint;
    after success it returns the summary that is there.

    Args:
        model_path: Directory or hub id of the base model.
        revision: Commit, tag or branch on the hub.
        inputs: Directory with mixture.safetensors and, unless nothing is to be probed,
            probe.safetensors.
        training: Settings; exactly one learning rate.
        seed: Seed of adapter initialisation and dropout. The order is part of the mixture.
        out: Directory to write into; created when missing.
        dtype: Number format; see `devices.resolve_precision`.
        loaded: The base model when it is in memory already; it is left as it was.
        on_progress: Called after each step with steps done, steps in all and the log record.

    Returns:
        The contents of summary.json.

    Raises:
        SpecError: Several learning rates, or best_dev without task probe items.
        DataError: Examples that cannot be trained on.
        ModelError: The base model cannot be used.
        DivergedError: The loss, its gradient or a probe loss is not finite.
        TrainingError: Memory ran out, or the base model itself gives no finite loss.
        PreemptedError: SIGTERM came; a checkpoint was written.
    """
    device = devices.resolve_device(training.device)
    check_ranks(training, device)
    with devices.exclusive_device(device), devices.cpu_threads(training.threads):
        precision = devices.resolve_precision(dtype, device, training.method)
        base = loaded or load_base(model_path, revision, training, dtype, device)
        mixture, probe = read_inputs(inputs, base.model)
        probe_digest = _probe_digest(inputs)
        identity = _identity(base.digest, mixture.digest, probe_digest, training, seed, dtype)
        out.mkdir(parents=True, exist_ok=True)
        finished = _finished_summary(out, identity)
        if finished is not None:
            return finished
        is_shared = loaded is not None
        with trainable(base.model, training, seed, device, is_shared=is_shared) as model:
            trainer = Trainer(model, mixture, probe, training, seed, device, precision)
            trainer.start_digests = (base.digest, probe_digest)
            if training.keep_probe_weights:
                trainer.on_probe = lambda step: models.save_trained(
                    trainer.model, base.tokenizer, probe_weights(out, step)
                )
            helpers = helper_arguments(
                model_path=base.id, revision=revision, inputs=inputs, training=training, dtype=dtype
            )
            with (
                open_ranks(helpers, trainer, training.num_ranks),
                explain_disk_errors(out),
                _examples_shown(mixture.examples, base.tokenizer),
            ):
                trainer.run(out, identity, on_progress)
                return _write_results(trainer, base.tokenizer, out, identity)


def probe_weights(trained: Path, step: int) -> Path:
    """Directory of the weights after ``step`` steps, in the manner of a training's own.

    Written where `training.keep_probe_weights` says so; `models.load_trained` reads it.
    """
    return trained / "probe_weights" / f"{step:07d}"


def load_base(
    model_path: str,
    revision: str | None,
    training: TrainingSpec,
    dtype: devices.DtypeName,
    device: torch.device,
) -> models.LoadedModel:
    """The base model: shared with the next cells under adapters, a model of its own otherwise."""
    if training.weight_quantization == "nf4":
        if training.method == "full":
            raise SpecError(
                "training.weight_quantization: nf4 freezes the base weights, and method: full"
                " trains them; use method: lora"
            )
        return models.load_quantized(model_path, revision=revision, device=device)
    if training.method == "full":
        return models.load_model(
            model_path, revision=revision, dtype=dtype, device=device, is_full=True
        )
    return models.shared_model(model_path, revision=revision, dtype=dtype, device=device)


def read_inputs(inputs: Path, model: PreTrainedModel) -> tuple[Mixture, EncodedExamples]:
    """Mixture and probe examples, checked against the model."""
    mixture = open_mixture(inputs)
    if len(mixture.order) == 0:
        raise DataError(f"{inputs} holds no examples to train on; raise the token budgets")
    probe_path = inputs / PROBE_FILE
    probe = EncodedExamples.load(probe_path) if probe_path.is_file() else from_lists([], True)
    max_tokens = getattr(model.config, "max_position_embeddings", None)
    vocab_size = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    for examples in (mixture.examples, probe):
        check_examples(examples, vocab_size=vocab_size, max_tokens=max_tokens)
    return mixture, probe


def _probe_digest(inputs: Path) -> str:
    path = inputs / PROBE_FILE
    return file_digest(path) if path.is_file() else ""


def _identity(
    model: str, mixture: str, probe: str, training: TrainingSpec, seed: int, dtype: str
) -> str:
    """Fingerprint of a training: what decides its result."""
    return fingerprint(model, mixture, probe, training_fields(training), seed, dtype)


def _finished_summary(out: Path, identity: str) -> dict[str, Any] | None:
    """The summary of this very training when it had already succeeded."""
    path = out / SUMMARY_FILE
    if not path.is_file():
        return None
    summary: dict[str, Any] = read_json(path)
    if summary.get("identity") != identity:
        return None
    remove_checkpoints(checkpoint_directory(out))
    return summary


@contextmanager
def trainable(
    base: PreTrainedModel,
    training: TrainingSpec,
    seed: int,
    device: torch.device,
    *,
    is_shared: bool,
) -> Iterator[nn.Module]:
    """The model to train, on ``device`` and in training mode; a shared base is left as it was.

    Adapters begin with weights drawn by ``seed``.
    """
    is_full = training.method == "full"
    needs_copy = is_shared and (is_full or base.device != device)
    model = nn.Module.to(copy.deepcopy(base) if needs_copy else base, device)
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), models.checkpointed(model, training):
        seed_step(seed, 0)
        if is_full:
            yield nn.Module.float(model).requires_grad_(True).train()
            return
        adapted = models.attach_lora(model, training)
        try:
            yield adapted.train()
        finally:
            models.detach_adapter(adapted.eval())


@contextmanager
def _examples_shown(
    examples: EncodedExamples, tokenizer: PreTrainedTokenizerBase
) -> Iterator[None]:
    """Add to a divergence how the responses of the examples concerned begin."""
    try:
        yield
    except DivergedError as error:
        shown = [
            f"{row} ({'task' if examples.is_task[row] else 'general'} data)"
            f" {_response(examples, row, tokenizer)!r}"
            for row in error.rows[:_SHOWN_EXAMPLES]
        ]
        words = f". Their responses begin: {'; '.join(shown)}" if shown else ""
        raise DivergedError(f"{error}{words}", error.rows) from error


def _response(examples: EncodedExamples, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
    start = int(examples.response_starts[row])
    ids = examples.example(row)[start : start + _SHOWN_TOKENS].tolist()
    return str(tokenizer.decode(ids))


def _write_results(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, out: Path, identity: str
) -> dict[str, Any]:
    """Write the kept weights and the probe losses, then the summary, then drop checkpoints.

    Each is on disk before the next begins: the summary says that the others are whole.
    """
    trainer.take_kept_weights()
    models.save_trained(trainer.model, tokenizer, out)
    progress = trainer.progress
    save_probe(
        out / PROBE_LOSSES_FILE,
        trainer.probe_steps,
        trainer.probe_losses(),
        trainer.traced_tokens,
        trainer.trace_losses(),
    )
    seconds = progress.train_seconds
    summary = {
        "identity": identity,
        "steps": progress.step,
        "train_seconds": seconds,
        "probe_seconds": progress.probe_seconds,
        "tokens_per_second": progress.tokens / seconds,
        "supervised_tokens_per_second": progress.supervised_tokens / seconds,
        "model_flops_utilisation": trainer.model_flops_utilisation(),
        "padding_share": 1 - progress.tokens / progress.padded_tokens,
        "attention": attention_name(
            trainer.model, trainer.engine.limits, trainer.device, trainer.precision
        ),
        "batching": trainer.engine.limits.layout,
        "micro_batch_tokens": trainer.engine.limits.max_tokens,
        "forward_passes": progress.forward_passes,
        "num_out_of_memory": progress.num_out_of_memory,
        "num_ranks": trainer.training.num_ranks,
        "peak_memory_bytes": trainer.peak_memory_bytes(),
        "device": trainer.device.type,
        "dtype": trainer.precision.name,
        "kept_step": progress.kept_step,
        "kept_dev_loss": progress.kept_dev_loss,
        "final_loss": progress.final_loss,
    }
    sync_below(out)
    write_json(out / SUMMARY_FILE, summary)
    sync_path(out)
    remove_checkpoints(checkpoint_directory(out))
    return summary
