"""The training loop, one for all arms.

Everything random is a function of seed and step, and the position in the data is a function of
the step, so a checkpoint needs neither random state nor loader state: a training that was killed
and started again gives, on a CPU, the bits of an unbroken one.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray, Mixture, from_lists
from tell_core.errors import DataError, SpecError, TrainingError
from tell_core.spec.identity import file_digest
from tell_core.spec.model import TrainingSpec
from tell_core.store import explain_disk_errors, read_json, write_json
from tell_core.training import devices, models
from tell_core.training.checkpoints import (
    Checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from tell_core.training.collation import FloatArray, check_examples
from tell_core.training.gradients import StepLosses, step_gradients
from tell_core.training.optimisation import (
    create_optimiser,
    learning_rate_at,
    optimiser_tensors,
    restore_optimiser,
    set_learning_rate,
    trainable_parameters,
)
from tell_core.training.probes import ProbeSet, probe_steps, save_probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, dict[str, Any]], None]

MIXTURE_FILE = "mixture.safetensors"
PROBE_FILE = "probe.safetensors"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.jsonl"
PROBE_LOSSES_FILE = "probe.npz"
_SEED_STRIDE = 1_000_003
_FLUSH_SECONDS = 2.0
_SHOWN_EXAMPLES = 8


class PreemptedError(TrainingError):
    """Training was asked to stop (SIGTERM); a checkpoint was written and a rerun goes on."""

    exit_code = 143


@dataclass
class StepRecord:
    """One line of the log.

    Attributes:
        step: Number of the step, from 0.
        loss: Mean NLL per supervised token of the step, in nats.
        task_loss: The same over task tokens only; None when the step has none.
        general_loss: The same over general tokens only; None when the step has none.
        learning_rate: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping.
        tokens: Tokens without padding.
        supervised_tokens: Supervised tokens.
        seconds: Wall time of the step.
    """

    step: int
    loss: float
    task_loss: float | None
    general_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


@dataclass
class Progress:
    """What a training has accumulated besides its weights; all of it goes into checkpoints."""

    step: int = 0
    train_seconds: float = 0.0
    probe_seconds: float = 0.0
    padded_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    final_loss: float | None = None
    peak_memory_bytes: int = 0
    kept_step: int | None = None
    kept_dev_loss: float | None = None
    log: list[str] = field(default_factory=list)
    probes: list[FloatArray] = field(default_factory=list)
    kept_weights: dict[str, torch.Tensor] = field(default_factory=dict)


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
        TrainingError: The loss is not finite, or memory ran out.
        PreemptedError: SIGTERM came; a checkpoint was written.
    """
    device = devices.resolve_device(training.device)
    with devices.exclusive_device(device), devices.cpu_threads(training.threads):
        precision = devices.resolve_precision(dtype, device, training.method)
        base = loaded or models.load_model(
            model_path,
            revision=revision,
            dtype=dtype,
            device=device,
            is_full=training.method == "full",
        )
        mixture, probe = _read_inputs(inputs, base.model)
        identity = models.training_identity(
            base.digest, mixture.digest, _probe_digest(inputs), training, seed, dtype
        )
        out.mkdir(parents=True, exist_ok=True)
        finished = _finished_summary(out, identity)
        if finished is not None:
            return finished
        is_shared = loaded is not None
        with _trainable(base.model, training, seed, device, is_shared) as model:
            trainer = Trainer(model, mixture, probe, training, seed, device, precision)
            with explain_disk_errors(out):
                trainer.run(out, identity, on_progress)
                return _write_results(trainer, base.tokenizer, out, identity)


class Trainer:
    """A model, its data and its optimiser, moved on one step at a time."""

    def __init__(
        self,
        model: nn.Module,
        mixture: Mixture,
        probe: EncodedExamples,
        training: TrainingSpec,
        seed: int,
        device: torch.device,
        precision: devices.Precision,
    ) -> None:
        if len(training.learning_rates) != 1:
            raise SpecError(
                f"training takes one learning rate, got {training.learning_rates}; choose one first"
            )
        if training.keep == "best_dev" and not probe.is_task.any():
            raise SpecError("keep: best_dev needs task items in the probe set; use keep: last")
        self.model = model
        self.mixture = mixture
        self.training = training
        self.seed = seed
        self.device = device
        self.precision = precision
        self.num_steps = mixture.num_steps(training.batch_size)
        self.probe_set = ProbeSet.prepare(probe, device)
        self.probe_steps = probe_steps(self.num_steps, training.num_probes)
        self.optimiser = create_optimiser(model, training.weight_decay)
        self.progress = Progress()

    def run(self, out: Path, identity: str, on_progress: OnProgress | None = None) -> None:
        """Train from the last checkpoint under ``out``, or from the start, to the last step."""
        checkpoint = load_checkpoint(_checkpoints(out), identity)
        if checkpoint is not None:
            self.restore(checkpoint)
            logger.info("going on from step %d of %d", checkpoint.step, self.num_steps)
        devices.reset_peak_memory(self.device)
        with _stop_requests() as stop_requested, _LogFile(out, self.progress.log) as log_file:
            saved = time.monotonic()
            self.probe_if_due()
            while self.progress.step < self.num_steps:
                record = self.train_step()
                log_file.append(self.progress.log[-1])
                self.probe_if_due()
                if on_progress is not None:
                    on_progress(self.progress.step, self.num_steps, asdict(record))
                is_due = time.monotonic() - saved > self.training.checkpoint_seconds
                if is_due or stop_requested.is_set():
                    save_checkpoint(_checkpoints(out), self.capture(identity))
                    saved = time.monotonic()
                if stop_requested.is_set():
                    raise PreemptedError(
                        f"stopped by SIGTERM after step {self.progress.step} of {self.num_steps};"
                        " a checkpoint is written, run the same command again to go on"
                    )

    def train_step(self) -> StepRecord:
        """One optimiser step, logged.

        Raises:
            TrainingError: The loss or the gradient is not finite, or memory ran out.
        """
        started = time.perf_counter()
        progress, training = self.progress, self.training
        step = progress.step
        rows = self.mixture.order[step * training.batch_size : (step + 1) * training.batch_size]
        _seed_step(self.seed, step + 1)
        self.optimiser.zero_grad(set_to_none=True)
        losses = self._gradients(rows)
        norm = nn.utils.clip_grad_norm_(
            trainable_parameters(self.model).values(), training.max_grad_norm
        )
        grad_norm = float(norm)
        if not (math.isfinite(losses.total) and math.isfinite(grad_norm)):
            raise TrainingError(_not_finite_message(step, rows, losses, grad_norm))
        rate = learning_rate_at(step, self.num_steps, training, training.learning_rates[0])
        set_learning_rate(self.optimiser, rate)
        self.optimiser.step()
        record = StepRecord(
            step=step,
            loss=losses.loss,
            task_loss=losses.task_loss,
            general_loss=losses.general_loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens=losses.num_tokens,
            supervised_tokens=losses.num_supervised,
            seconds=time.perf_counter() - started,
        )
        self._account(record, losses)
        return record

    def _gradients(self, rows: IntArray) -> StepLosses:
        try:
            return step_gradients(
                self.model,
                self.mixture.examples,
                rows,
                micro_batch_size=self.training.micro_batch_size,
                device=self.device,
                precision=self.precision,
            )
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory on {self.device} at step {self.progress.step}:"
                f" {len(rows)} examples of up to {self.mixture.examples.lengths[rows].max()} tokens"
                f" with micro_batch_size {self.training.micro_batch_size}; lower micro_batch_size,"
                " which changes memory but not the result"
            ) from error

    def _account(self, record: StepRecord, losses: StepLosses) -> None:
        progress = self.progress
        progress.step += 1
        progress.train_seconds += record.seconds
        progress.tokens += losses.num_tokens
        progress.padded_tokens += losses.num_padded_tokens
        progress.supervised_tokens += losses.num_supervised
        progress.final_loss = record.loss
        progress.log.append(json.dumps(asdict(record)) + "\n")

    def probe_if_due(self) -> None:
        """Measure the probe set when this step is a probe step, and keep the best weights."""
        progress = self.progress
        due = self.probe_steps[len(progress.probes) :]
        if not due or due[0] != progress.step:
            return
        started = time.perf_counter()
        losses = self.probe_set.measure(self.model, self.precision.autocast(self.device))
        progress.probes.append(losses)
        self._keep_if_best(self.probe_set.task_loss(losses))
        progress.probe_seconds += time.perf_counter() - started

    def _keep_if_best(self, dev_loss: float | None) -> None:
        """Keep these weights if no earlier trained ones had an equal or lower task dev loss.

        Step 0 is never kept: an arm that trained must be scored on trained weights, else `sft`
        at a harmful learning rate would silently report the score of `base`.
        """
        progress = self.progress
        if self.training.keep == "last":
            if progress.step == self.num_steps:
                progress.kept_step, progress.kept_dev_loss = progress.step, dev_loss
            return
        if progress.step == 0 or dev_loss is None or not math.isfinite(dev_loss):
            return
        if progress.kept_dev_loss is None or dev_loss < progress.kept_dev_loss:
            progress.kept_step, progress.kept_dev_loss = progress.step, dev_loss
            progress.kept_weights = _copy_weights(self.model)

    def capture(self, identity: str) -> Checkpoint:
        """All that is needed to go on from here."""
        progress = self.progress
        progress.peak_memory_bytes = self.peak_memory_bytes()
        tensors = {
            f"weight/{name}": value.detach()
            for name, value in trainable_parameters(self.model).items()
        }
        tensors |= {f"kept/{name}": value for name, value in progress.kept_weights.items()}
        tensors |= optimiser_tensors(self.model, self.optimiser)
        tensors["probes"] = torch.from_numpy(self.probe_losses())
        state = {name: getattr(progress, name) for name in _SCALARS}
        return Checkpoint(progress.step, identity, tensors, state, "".join(progress.log))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `capture` took."""
        tensors = checkpoint.tensors
        _load_weights(self.model, _with_prefix(tensors, "weight/"))
        restore_optimiser(self.model, self.optimiser, tensors, checkpoint.step)
        self.progress = Progress(
            **checkpoint.state,
            log=checkpoint.log.splitlines(keepends=True),
            probes=list(tensors["probes"].numpy()),
            kept_weights=_with_prefix(tensors, "kept/"),
        )

    def keep_best_weights(self) -> None:
        """Give the model the weights that are to be kept."""
        if self.progress.kept_step != self.num_steps and self.progress.kept_weights:
            _load_weights(self.model, self.progress.kept_weights)

    def probe_losses(self) -> FloatArray:
        """Probe losses so far, shape (P, N)."""
        shape = (len(self.progress.probes), self.probe_set.num_examples)
        return np.asarray(self.progress.probes, dtype=np.float64).reshape(shape)

    def peak_memory_bytes(self) -> int:
        """Peak memory over all attempts at this training."""
        return max(self.progress.peak_memory_bytes, devices.peak_memory_bytes(self.device))


_SCALARS = (
    "step",
    "train_seconds",
    "probe_seconds",
    "padded_tokens",
    "tokens",
    "supervised_tokens",
    "final_loss",
    "peak_memory_bytes",
    "kept_step",
    "kept_dev_loss",
)


def _not_finite_message(step: int, rows: IntArray, losses: StepLosses, grad_norm: float) -> str:
    suspects = losses.rows_not_finite() or rows.tolist()
    shown = ", ".join(map(str, suspects[:_SHOWN_EXAMPLES]))
    more = ", ..." if len(suspects) > _SHOWN_EXAMPLES else ""
    return (
        f"step {step}: loss {losses.loss}, gradient norm {grad_norm}; both must be finite."
        f" Examples concerned (rows of the mixture): {shown}{more}. Lower the learning rate, or"
        " use dtype float32"
    )


def _read_inputs(inputs: Path, model: PreTrainedModel) -> tuple[Mixture, EncodedExamples]:
    """Mixture and probe examples, checked against the model."""
    path = inputs / MIXTURE_FILE
    if not path.is_file():
        raise DataError(f"{path} is missing; needed: the mixture of this cell (`tell mix`)")
    mixture = Mixture.load(path)
    if len(mixture.order) == 0:
        raise DataError(f"{path} holds no examples to train on; raise the token budgets")
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


def _finished_summary(out: Path, identity: str) -> dict[str, Any] | None:
    """The summary of this very training when it had already succeeded."""
    path = out / SUMMARY_FILE
    if not path.is_file():
        return None
    summary: dict[str, Any] = read_json(path)
    if summary.get("identity") != identity:
        return None
    remove_checkpoints(_checkpoints(out))
    return summary


@contextmanager
def _trainable(
    base: PreTrainedModel,
    training: TrainingSpec,
    seed: int,
    device: torch.device,
    is_shared: bool,
) -> Iterator[nn.Module]:
    """The model to train, in training mode; a shared base model is left as it was."""
    cuda = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        _seed_step(seed, 0)
        if training.method == "full":
            model: nn.Module = copy.deepcopy(base) if is_shared else base
            yield nn.Module.float(model).requires_grad_(True).train()
            return
        adapted = models.attach_lora(base, training)
        try:
            yield adapted.train()
        finally:
            models.detach_adapter(adapted.eval())


def _seed_step(seed: int, number: int) -> None:
    """Seed torch: number 0 for adapter initialisation, ``step + 1`` for the dropout of a step."""
    torch.manual_seed(seed * _SEED_STRIDE + number)


def _copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = trainable_parameters(model)
    return {name: value.detach().clone() for name, value in parameters.items()}


def _load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(tensors[name])


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _checkpoints(out: Path) -> Path:
    return out / "checkpoints"


def _write_results(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, out: Path, identity: str
) -> dict[str, Any]:
    """Write the kept weights and the probe losses, then the summary, then drop checkpoints."""
    trainer.keep_best_weights()
    models.save_trained(trainer.model, tokenizer, out)
    progress = trainer.progress
    save_probe(out / PROBE_LOSSES_FILE, trainer.probe_steps, trainer.probe_losses())
    seconds = progress.train_seconds
    summary = {
        "identity": identity,
        "steps": progress.step,
        "train_seconds": seconds,
        "probe_seconds": progress.probe_seconds,
        "tokens_per_second": progress.tokens / seconds,
        "supervised_tokens_per_second": progress.supervised_tokens / seconds,
        "padding_share": 1 - progress.tokens / progress.padded_tokens,
        "peak_memory_bytes": trainer.peak_memory_bytes(),
        "device": trainer.device.type,
        "dtype": trainer.precision.name,
        "kept_step": progress.kept_step,
        "kept_dev_loss": progress.kept_dev_loss,
        "final_loss": progress.final_loss,
    }
    write_json(out / SUMMARY_FILE, summary)
    remove_checkpoints(_checkpoints(out))
    return summary


class _LogFile:
    """log.jsonl: begun with the lines of the checkpoint, then one line per step."""

    def __init__(self, out: Path, lines: list[str]) -> None:
        self._file = (out / LOG_FILE).open("w", encoding="utf-8")
        self._file.writelines(lines)
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: str) -> None:
        """Add a line; it reaches the file within seconds, for those who watch."""
        self._file.write(line)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; only the main thread can watch for it."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)
