"""What of the training settings decides the result, and so belongs to a training's identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tell_core.spec.model import TrainingSpec

# In what pieces a step is computed: adapter dropout draws by piece.
_PIECES = frozenset({"batching", "micro_batch_size", "micro_batch_tokens", "num_ranks"})
# Where, how fast and in what pieces a training is computed, never what.
NOT_IDENTITY = _PIECES | {"device", "threads", "checkpoint_seconds", "gradient_checkpointing"}

# Tokens of a forward pass under `micro_batch_tokens: auto`; on a CPU, 2 GB less for SmolLM2-135M in
# the same time (docs/performance.md).
AUTO_TOKENS, AUTO_TOKENS_CPU = 4096, 1024


def draws_by_piece(training: TrainingSpec) -> bool:
    """Whether the pieces in which a step is computed change more than rounding."""
    return training.method == "lora" and training.lora_dropout > 0


def tokens_per_pass(training: TrainingSpec, *, is_cpu: bool) -> int | None:
    """Most tokens of a forward pass, None without a limit; with adapter dropout as anywhere."""
    if training.micro_batch_tokens != "auto":
        return training.micro_batch_tokens
    return AUTO_TOKENS_CPU if is_cpu and not draws_by_piece(training) else AUTO_TOKENS


def training_fields(training: TrainingSpec) -> dict[str, Any]:
    """The settings that decide what a training gives, by name; JSON values.

    The stage's fingerprint and the checkpoint's identity are both made of these. The learning rate
    is among them as it stands in ``training``: settle a tuned one first. The pieces in which a step
    is computed count only with adapter dropout, whose draws follow them; otherwise they change sums
    by rounding.
    """
    ignored = NOT_IDENTITY - _PIECES if draws_by_piece(training) else NOT_IDENTITY
    fields = training.model_dump(mode="json", exclude=set(ignored))
    if fields.get("micro_batch_tokens") == "auto":
        fields["micro_batch_tokens"] = AUTO_TOKENS
    if not training.keep_probe_weights:  # it only adds files: without them nothing differs
        del fields["keep_probe_weights"]
    if training.probe_share is None:  # no limit is what there was before there could be one
        del fields["probe_share"]
    return fields
