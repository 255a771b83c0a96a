"""The training loop, one for all arms: steps, probes, checkpoints and the log.

Everything random is a function of seed and step, and the position in the data is a function of
the step, so a checkpoint needs neither random state nor loader state: a training that was killed
and started again gives, on a CPU, the bits of an unbroken one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray, Mixture
from tell_core.errors import SpecError, TrainingError
from tell_core.training import devices
from tell_core.training.attention import attended, choose_limits
from tell_core.training.batching import BatchCounts, count_batches, tighter
from tell_core.training.checkpoints import (
    Checkpoint,
    CheckpointClock,
    load_checkpoint,
    save_checkpoint,
)
from tell_core.training.collation import FloatArray
from tell_core.training.gradients import StepLosses, step_gradients
from tell_core.training.optimisation import (
    MOMENTS,
    create_optimiser,
    learning_rate_at,
    optimiser_tensors,
    restore_optimiser,
    set_learning_rate,
    trainable_parameters,
)
from tell_core.training.probes import (
    ProbeSet,
    RememberedLosses,
    TracedTokens,
    num_affordable_probes,
    probe_steps,
)
from tell_core.training.ranks import Ranks
from tell_core.training.stopping import STOP_VARIABLE, stop_requests, stop_seconds
from tell_core.training.telemetry import model_sizes, peak_flops, step_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tell_core.spec.model import TrainingSpec

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, dict[str, Any]], None]

LOG_FILE = "log.jsonl"
_SEED_STRIDE = 1_000_003
_RANK_STRIDE = 2**31  # beyond every seed of a specification
_FLUSH_SECONDS = 2.0
_SHOWN_EXAMPLES = 8
_EXPLODED = 2.0
_untrained = RememberedLosses()


class DivergedError(TrainingError):
    """A loss or its gradient is not finite, or has exploded: this learning rate is too high.

    Attributes:
        rows: Examples of the mixture by which it shows; none where the probe set shows it.
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class PreemptedError(TrainingError):
    """Training was asked to stop (SIGTERM); a rerun goes on from the last checkpoint."""

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
        padded_tokens: Tokens with padding.
        supervised_tokens: Supervised tokens.
        seconds: Wall time of the step.
        finished: When the step was done, in seconds since 1970.
        peak_memory_bytes: Peak memory of this process so far; see `devices.peak_memory_bytes`.
    """

    step: int
    loss: float
    task_loss: float | None
    general_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens: int
    padded_tokens: int
    supervised_tokens: int
    seconds: float
    finished: float
    peak_memory_bytes: int


@dataclass
class Progress:
    """What a training has accumulated besides its weights; all of it goes into checkpoints."""

    step: int = 0
    train_seconds: float = 0.0
    probe_seconds: float = 0.0
    padded_tokens: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    forward_passes: int = 0
    flops: float = 0.0
    max_tokens: int | None = None
    num_out_of_memory: int = 0
    final_loss: float | None = None
    peak_memory_bytes: int = 0
    kept_step: int | None = None
    kept_dev_loss: float | None = None
    log: list[str] = field(default_factory=list)
    probes: list[FloatArray] = field(default_factory=list)
    traces: list[FloatArray] = field(default_factory=list)
    kept_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class StepEngine:
    """A model and its data: the gradient of any step, in forward passes that fit into memory.

    Attributes:
        limits: Layout and size of forward passes; smaller after memory ran out.
        num_out_of_memory: How often it ran out.
        parameters: The trained parameters, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        mixture: Mixture,
        training: TrainingSpec,
        device: torch.device,
        precision: devices.Precision,
    ) -> None:
        self.model = model
        self.mixture = mixture
        self.batch_size = training.batch_size
        self.num_ranks = training.num_ranks
        self.device = device
        self.precision = precision
        self.parameters = trainable_parameters(model)
        self.num_out_of_memory = 0
        self.limits = choose_limits(
            cast("PreTrainedModel", model), mixture.examples, self.rows(0), training, device,
            precision,
        )  # fmt: skip

    def rows(self, step: int) -> IntArray:
        """The examples of a step, shape (B,)."""
        return self.mixture.order[step * self.batch_size : (step + 1) * self.batch_size]

    def attended(self) -> AbstractContextManager[None]:
        """Context in which gradients are computed: packed examples are kept apart."""
        return attended(cast("PreTrainedModel", self.model), self.limits)

    def count_batches(self) -> BatchCounts:
        """What the whole training will compute, at the present limits."""
        lengths, order = self.mixture.examples.lengths, self.mixture.order
        return count_batches(lengths, order, self.batch_size, self.limits, self.num_ranks)

    def gradients(self, step: int, seed: int, ranks: Ranks | None = None) -> StepLosses:
        """Gradient of one step; when memory runs out, again in smaller forward passes.

        Raises:
            TrainingError: Memory ran out with one example at a time.
        """
        rows = self.rows(step)
        share = ranks.share(self.mixture.examples.lengths[rows]) if ranks else None
        while True:
            seed_step(seed, step + 1, ranks.rank if ranks else 0)
            self.model.zero_grad(set_to_none=True)
            losses = self._gradients_if_they_fit(rows, share)
            if losses is None:  # what the failed pass held is free by now
                self._tighten(step, rows if share is None else rows[share])
                continue
            if ranks:
                ranks.add_up(losses, rows)
            return losses

    def _gradients_if_they_fit(self, rows: IntArray, share: IntArray | None) -> StepLosses | None:
        """Sums over one step and its gradient; None when memory ran out."""
        try:
            return step_gradients(
                self.model,
                self.mixture.examples,
                rows,
                limits=self.limits,
                device=self.device,
                precision=self.precision,
                share=share,
            )
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            return None

    def rows_at_fault(self, step: int, seed: int) -> list[int]:
        """Examples of a step whose own gradient is not finite; all of them when none is.

        For a step whose losses are finite and whose gradient is not. Dropout draws are others than
        those of the step.
        """
        rows = np.unique(self.rows(step)).tolist()
        return [row for row in rows if not self._has_finite_gradient(row, step, seed)] or rows

    def _has_finite_gradient(self, row: int, step: int, seed: int) -> bool:
        seed_step(seed, step + 1)
        self.model.zero_grad(set_to_none=True)
        step_gradients(
            self.model,
            self.mixture.examples,
            np.asarray([row]),
            limits=self.limits,
            device=self.device,
            precision=self.precision,
        )
        norms = nn.utils.get_total_norm(
            [weight.grad for weight in self.parameters.values() if weight.grad is not None]
        )
        return bool(torch.isfinite(norms))

    def _tighten(self, step: int, rows: IntArray) -> None:
        """Halve the largest forward pass; step, effective batch and loss stay what they are."""
        lengths = self.mixture.examples.lengths[rows]
        limits = tighter(self.limits, lengths)
        if limits is None:
            raise TrainingError(
                f"out of memory on {self.device} at step {step}, with one example of up to"
                f" {lengths.max()} tokens at a time; set training.gradient_checkpointing: true,"
                " lower curation.max_tokens, or use a smaller model"
            )
        logger.warning(
            "out of memory on %s at step %d: forward passes of at most %s tokens instead of %s from"
            " here on; the step and its loss are the same",
            self.device,
            step,
            limits.max_tokens,
            self.limits.max_tokens,
        )
        self.limits = limits
        self.num_out_of_memory += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Trainer:
    """A model, its data and its optimiser, moved on one step at a time.

    Attributes:
        on_probe: Called with the number of steps done after every probe, where it is given.
        start_digests: Those of the base model and of the probe set. Where given, what they give
            before the first step is measured once in this process, for all trainings that begin so.
    """

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
        if training.is_tuned:
            raise SpecError(
                "training takes one learning rate and one number of epochs, got"
                f" {[tuple(candidate) for candidate in training.candidates]}; choose one first"
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
        self.engine = StepEngine(model, mixture, training, device, precision)
        is_packed = self.engine.limits.layout == "packed"
        self.probe_set = ProbeSet.prepare(probe, device, is_packed=is_packed)
        self.traced_tokens = TracedTokens.choose(self.probe_set, training.trace_tokens)
        num_probes = num_affordable_probes(mixture, probe, training)
        self.probe_steps = probe_steps(self.num_steps, num_probes)
        self.parameters = self.engine.parameters
        self.optimiser = create_optimiser(self.parameters, training.weight_decay)
        self.sizes = model_sizes(model)
        self.ranks: Ranks | None = None
        self.on_probe: Callable[[int], None] | None = None
        self.start_digests: tuple[str, str] | None = None
        self.progress = Progress()

    def run(self, out: Path, identity: str, on_progress: OnProgress | None = None) -> None:
        """Train from the last checkpoint under ``out``, or from the start, to the last step."""
        checkpoint = load_checkpoint(checkpoint_directory(out), identity, self.find_misfit)
        if checkpoint is not None:
            self.restore(checkpoint)
            logger.info("going on from step %d of %d", checkpoint.step, self.num_steps)
        counts = self.engine.count_batches()
        logger.info(
            "%d steps, %s: %d forward passes, %d tokens, %.1f %% of what is computed is padding",
            counts.steps,
            self.engine.limits.layout,
            counts.forward_passes,
            counts.tokens,
            100 * counts.padding_share,
        )
        devices.reset_peak_memory(self.device)
        with (
            self._shortage_explained(),
            self.engine.attended(),
            stop_requests() as stop_requested,
            _LogFile(out, self.progress.log) as log_file,
        ):
            clock = CheckpointClock(self.training.checkpoint_seconds)
            patience = stop_seconds()
            self.probe_if_due()
            while self.progress.step < self.num_steps:
                record = self.train_step()
                log_file.append(self.progress.log[-1])
                self.probe_if_due()
                if on_progress is not None:
                    on_progress(self.progress.step, self.num_steps, asdict(record))
                is_stopped = stop_requested.is_set()
                if clock.can_write_within(patience) if is_stopped else clock.is_due():
                    with clock.writing(self.progress.step):
                        save_checkpoint(checkpoint_directory(out), self.capture(identity))
                if is_stopped:
                    raise PreemptedError(self._stopped_message(clock, patience))

    def _stopped_message(self, clock: CheckpointClock, patience: float) -> str:
        what = "a checkpoint is written, run the same command again to go on"
        if clock.step != self.progress.step:
            what = (
                f"the last checkpoint took {clock.write_seconds:.1f} s to write, more than the"
                f" {patience:g} s that {STOP_VARIABLE} leaves, so none was begun: the same"
                f" command goes on from step {clock.step}"
            )
        return f"stopped by SIGTERM after step {self.progress.step} of {self.num_steps}; {what}"

    @contextmanager
    def _shortage_explained(self) -> Iterator[None]:
        """Say what needs less memory where smaller forward passes are no help."""
        try:
            yield
        except RuntimeError as error:
            if not devices.is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory on {self.device} at step {self.progress.step}, beside the forward"
                " passes of the training (optimiser, probe set or checkpoint); use a smaller model,"
                " method: lora, or fewer general_heldout_examples and dev_examples"
            ) from error

    def train_step(self) -> StepRecord:
        """One optimiser step, logged.

        Raises:
            DivergedError: The loss or the gradient is not finite, or has exploded.
            TrainingError: Memory ran out.
        """
        started = time.perf_counter()
        progress, training = self.progress, self.training
        step = progress.step
        losses = self._gradients(step)
        grad_norm = float(
            nn.utils.clip_grad_norm_(self.parameters.values(), training.max_grad_norm)
        )
        if not (math.isfinite(losses.total) and math.isfinite(grad_norm)):
            suspects = losses.rows_not_finite() or self.engine.rows_at_fault(step, self.seed)
            raise DivergedError(_not_finite_message(step, suspects, losses, grad_norm), suspects)
        if losses.loss > self._exploded_loss():
            worst = losses.worst_rows(self.mixture.examples)[:_SHOWN_EXAMPLES]
            raise DivergedError(_exploded_message(step, worst, losses), worst)
        peak = training.candidates[0].learning_rate
        rate = learning_rate_at(step, self.num_steps, training, peak)
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
            padded_tokens=losses.num_padded_tokens,
            supervised_tokens=losses.num_supervised,
            seconds=time.perf_counter() - started,
            finished=time.time(),
            peak_memory_bytes=devices.peak_memory_bytes(self.device),
        )
        self._account(record, losses)
        return record

    def _exploded_loss(self) -> float:
        """Mean loss of a step, in nats, above which training has left the model behind.

        Twice the loss of guessing every token blindly, or of the first step where that is more: a
        model that is only worse than it was stays far below it.
        """
        embeddings = cast("PreTrainedModel", self.model).get_input_embeddings()
        blind = math.log(cast("nn.Embedding", embeddings).num_embeddings)
        first = json.loads(self.progress.log[0])["loss"] if self.progress.log else math.inf
        return _EXPLODED * max(blind, float(first))

    def _gradients(self, step: int) -> StepLosses:
        """Gradient of one step, all ranks together."""
        if self.ranks:
            self.ranks.announce(step, self.seed)
            self.ranks.hand_round()
        return self.engine.gradients(step, self.seed, self.ranks)

    def _account(self, record: StepRecord, losses: StepLosses) -> None:
        progress = self.progress
        progress.step += 1
        progress.train_seconds += record.seconds
        progress.tokens += losses.num_tokens
        progress.padded_tokens += losses.num_padded_tokens
        progress.supervised_tokens += losses.num_supervised
        progress.forward_passes += losses.num_forward_passes
        lengths = self.mixture.examples.lengths[self.engine.rows(record.step)]
        progress.flops += step_flops(self.sizes, lengths, losses.num_supervised)
        progress.max_tokens = self.engine.limits.max_tokens
        progress.num_out_of_memory = self.engine.num_out_of_memory
        progress.final_loss = record.loss
        progress.log.append(json.dumps(asdict(record)) + "\n")

    def probe_if_due(self) -> None:
        """Measure the probe set when this step is a probe step, and keep the best weights.

        Raises:
            DivergedError: A probe loss is not finite after training.
            TrainingError: A probe loss is not finite before any training.
        """
        progress = self.progress
        due = self.probe_steps[len(progress.probes) :]
        if not due or due[0] != progress.step:
            return
        started = time.perf_counter()
        nll_T = self._token_losses()
        losses = self.probe_set.by_example(nll_T)
        if not np.isfinite(losses).all():
            raise _probe_error(progress.step, losses)
        progress.probes.append(losses)
        progress.traces.append(nll_T[self.traced_tokens.places])
        self._keep_if_best(self.probe_set.task_loss(losses))
        if self.on_probe is not None:
            self.on_probe(progress.step)
        progress.probe_seconds += time.perf_counter() - started

    def _token_losses(self) -> FloatArray:
        """Losses of the probe set's supervised tokens under the present weights, shape (T,)."""

        def measure() -> FloatArray:
            return self.probe_set.measure_tokens(self.model, self.precision.autocast(self.device))

        if self.progress.step or self.start_digests is None:
            return measure()
        return _untrained.get(self._what_decides_losses(self.start_digests), measure)

    def _what_decides_losses(self, digests: tuple[str, str]) -> Hashable:
        """All that the bits of the untrained model's losses depend on, within this process."""
        attention = cast("PreTrainedModel", self.model).config._attn_implementation
        shares_beginnings = bool(self.probe_set.blocks)
        how = (attention, shares_beginnings, self.precision, str(self.device))
        own = (self.training.method, self.training.weight_quantization)
        return (*digests, *how, *own, torch.get_num_threads())

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
        if progress.step == 0 or dev_loss is None:
            return
        if progress.kept_dev_loss is None or dev_loss < progress.kept_dev_loss:
            progress.kept_step, progress.kept_dev_loss = progress.step, dev_loss
            progress.kept_weights = {
                name: value.detach().clone() for name, value in self.parameters.items()
            }

    def capture(self, identity: str) -> Checkpoint:
        """All that is needed to go on from here."""
        progress = self.progress
        progress.peak_memory_bytes = self.peak_memory_bytes()
        tensors = {f"weight/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"kept/{name}": value for name, value in progress.kept_weights.items()}
        tensors |= optimiser_tensors(self.parameters, self.optimiser)
        tensors["probes"] = torch.from_numpy(self.probe_losses())
        tensors["traces"] = torch.from_numpy(self.trace_losses())
        state = {name: getattr(progress, name) for name in _SCALARS}
        return Checkpoint(progress.step, identity, tensors, state, "".join(progress.log))

    def find_misfit(self, checkpoint: Checkpoint) -> str | None:
        """What keeps `restore` from going on from this checkpoint exactly; None when nothing does.

        Its identity is that of this training: what differs is the program that wrote it.
        """
        if set(checkpoint.state) != set(_SCALARS):
            names = sorted(set(checkpoint.state) ^ set(_SCALARS))
            return f"of its state, {', '.join(names)} are not in both versions"
        shapes = self._tensor_shapes(checkpoint)
        for name, shape in shapes.items():
            found = checkpoint.tensors.get(name)
            if found is None or tuple(found.shape) != shape:
                had = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                return f"{name} {had}, needed {shape}"
        unknown = sorted(set(checkpoint.tensors) - set(shapes))
        return f"{unknown[0]} is not known here" if unknown else None

    def _tensor_shapes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        """Tensors that a checkpoint after so many steps holds, by name.

        A weight that never had a gradient has no moments.
        """
        own = {name: tuple(value.shape) for name, value in self.parameters.items()}
        prefixes = {"weight"}
        if self.training.keep == "best_dev" and checkpoint.state["kept_step"] is not None:
            prefixes.add("kept")
        shapes = {f"{prefix}/{name}": shape for prefix in prefixes for name, shape in own.items()}
        for name, shape in own.items():
            moments = [f"{moment}/{name}" for moment in MOMENTS]
            if any(moment in checkpoint.tensors for moment in moments):
                shapes |= dict.fromkeys(moments, shape)
        num_probes = sum(due <= checkpoint.step for due in self.probe_steps)
        shapes["probes"] = (num_probes, self.probe_set.num_examples)
        shapes["traces"] = (num_probes, len(self.traced_tokens.places))
        return shapes

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `capture` took."""
        tensors = checkpoint.tensors
        self._load_weights(_with_prefix(tensors, "weight/"))
        restore_optimiser(self.parameters, self.optimiser, tensors, checkpoint.step)
        self.progress = Progress(
            **checkpoint.state,
            log=checkpoint.log.splitlines(keepends=True),
            probes=list(tensors["probes"].numpy()),
            traces=list(tensors["traces"].numpy()),
            kept_weights=_with_prefix(tensors, "kept/"),
        )
        if self.progress.num_out_of_memory:
            self.engine.num_out_of_memory = self.progress.num_out_of_memory
            # What memory allowed before; less where this machine or its user allow less.
            most = (self.engine.limits.max_tokens, self.progress.max_tokens)
            self.engine.limits = replace(
                self.engine.limits, max_tokens=min(one for one in most if one is not None)
            )

    def take_kept_weights(self) -> None:
        """Give the model the weights that are to be kept."""
        if self.progress.kept_weights:
            self._load_weights(self.progress.kept_weights)

    def _load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def probe_losses(self) -> FloatArray:
        """Probe losses so far, shape (P, N)."""
        shape = (len(self.progress.probes), self.probe_set.num_examples)
        return np.asarray(self.progress.probes, dtype=np.float64).reshape(shape)

    def trace_losses(self) -> FloatArray:
        """Losses of the traced tokens so far, shape (P, S)."""
        shape = (len(self.progress.traces), len(self.traced_tokens.places))
        return np.asarray(self.progress.traces, dtype=np.float64).reshape(shape)

    def model_flops_utilisation(self) -> float | None:
        """Share of the device's arithmetic that was used; None where its peak is unknown.

        The convention is that of `telemetry`.
        """
        peak = peak_flops(self.device, self.precision, self.training.threads)
        if peak is None or not self.progress.train_seconds:
            return None
        peak *= self.training.num_ranks
        return self.progress.flops / self.progress.train_seconds / peak

    def peak_memory_bytes(self) -> int:
        """Peak memory over all attempts at this training; see `devices.peak_memory_bytes`."""
        return max(self.progress.peak_memory_bytes, devices.peak_memory_bytes(self.device))


_SCALARS = (
    "step",
    "train_seconds",
    "probe_seconds",
    "padded_tokens",
    "tokens",
    "supervised_tokens",
    "forward_passes",
    "flops",
    "max_tokens",
    "num_out_of_memory",
    "final_loss",
    "peak_memory_bytes",
    "kept_step",
    "kept_dev_loss",
)


def _not_finite_message(
    step: int, suspects: Sequence[int], losses: StepLosses, grad_norm: float
) -> str:
    return (
        f"step {step}: loss {losses.loss}, gradient norm {grad_norm}; both must be finite."
        f" Examples concerned (rows of the mixture): {_shown(suspects)}. Lower the learning rate,"
        " or use dtype float32"
    )


def _exploded_message(step: int, worst: Sequence[int], losses: StepLosses) -> str:
    return (
        f"step {step}: loss {losses.loss:.3g} nats a token, more than twice that of guessing"
        f" blindly; training has exploded. Examples with the highest loss (rows of the mixture):"
        f" {_shown(worst)}. Lower the learning rate"
    )


def _probe_error(step: int, losses: FloatArray) -> TrainingError:
    """What to raise for probe losses (N,) that are not all finite after ``step`` steps."""
    rows = _shown(np.flatnonzero(~np.isfinite(losses)).tolist())
    what = f"step {step}: the loss of probe examples (rows of the probe set) {rows} is not finite"
    if step == 0:
        return TrainingError(
            f"{what} before any training; use another base model, or dtype float32"
        )
    return DivergedError(f"{what}. Lower the learning rate, or use dtype float32")


def _shown(rows: Sequence[int]) -> str:
    more = ", ..." if len(rows) > _SHOWN_EXAMPLES else ""
    return ", ".join(map(str, rows[:_SHOWN_EXAMPLES])) + more


def checkpoint_directory(out: Path) -> Path:
    """Where the checkpoints of a training lie."""
    return out / "checkpoints"


def seed_step(seed: int, number: int, rank: int = 0) -> None:
    """Seed torch: number 0 for adapter initialisation, ``step + 1`` for the dropout of a step."""
    torch.manual_seed((rank * _RANK_STRIDE + seed) * _SEED_STRIDE + number)


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


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
