"""Probes: the loss of fixed examples at logarithmically spaced steps of a training.

The loss of single tokens comes with it at no extra forward pass: an example's loss is the mean over
its supervised tokens. Of all these tokens a seeded choice is kept, the same in every cell. Where
the model allows, examples that begin alike share the computation of their beginning.

Shape letters: N probe examples, P probe steps, T supervised tokens of the probe set, S of them
whose own losses are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tell_core.data.encoding import EncodedExamples, IntArray, Mixture
from tell_core.training.batching import Limits, lay_out
from tell_core.training.collation import FloatArray, MicroBatch, collate
from tell_core.training.losses import supervised_nll
from tell_core.training.shared_prefixes import (
    PrefixBlock,
    group_by_prefix,
    lay_out_groups,
    prefixes_attended,
)

if TYPE_CHECKING:
    from tell_core.spec.model import TrainingSpec

# Untrained models whose losses are remembered. Cells of one process mostly share one; a number per
# supervised token of the probe set each.
_REMEMBERED = 4
# Tokens of a forward pass. On a CPU the activations of more leave its caches: the demo model reads
# 2048 tokens 1.3 times as fast as 8192, and 1.9 times as fast as 128.
PROBE_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
FEWEST_PROBES = 8
"""Points below which the shape of a loss curve is not judged at all."""
# A token that is only read costs 2 operations per weight, of the 6 of one that all weights are
# trained on, and of the 4 where gradients go to adapters and activations alone.
_READING_COST = {"full": 1 / 3, "lora": 1 / 2}
_TRACE_SEED = 0  # never the training's: all cells trace the same tokens


def probe_steps(num_steps: int, num_probes: int) -> tuple[int, ...]:
    """Steps after which the probe set is measured: 0 (untrained) to ``num_steps``, rising.

    Logarithmically spaced, then moved apart where rounding would make them coincide, so that there
    are exactly ``num_probes`` of them unless the training has fewer steps.

    Args:
        num_steps: Optimiser steps of the training, at least 1.
        num_probes: Wished number of probes, at least 2.
    """
    count = min(num_probes, num_steps + 1)
    steps = [0]
    for index, ideal in enumerate(np.geomspace(1, num_steps, count - 1), start=1):
        latest = num_steps - (count - 1 - index)
        steps.append(min(max(round(ideal), steps[-1] + 1), latest))
    steps[-1] = num_steps
    return tuple(steps)


def num_affordable_probes(mixture: Mixture, probe: EncodedExamples, training: TrainingSpec) -> int:
    """``num_probes``, or fewer where they would cost more than ``probe_share`` of the training.

    Counted in tokens, beginnings that examples share once, so that it is the same on every machine
    and after every interruption. Never fewer than `FEWEST_PROBES`, whatever they cost.

    Args:
        mixture: What is trained on.
        probe: What is measured.
        training: Gives method, ``num_probes`` and ``probe_share``.
    """
    if training.probe_share is None or not len(probe):
        return training.num_probes
    read = sum(group.num_tokens(probe) for group in group_by_prefix(probe))
    trained = int(mixture.examples.lengths[mixture.order].sum())
    count = int(training.probe_share * trained / (_READING_COST[training.method] * read))
    return min(training.num_probes, max(count, FEWEST_PROBES))


@dataclass(frozen=True)
class ProbeSet:
    """Probe examples, collated once.

    Attributes:
        batches: Micro-batches: of similar length, or rows with shared beginnings.
        token_starts: Shape (N + 1,). Where the supervised tokens of each example begin among all
            T of them.
        is_task: Shape (N,). Whether an example belongs to the task.
        blocks: For each batch the blocks of its row; empty where beginnings are not shared.
    """

    batches: tuple[MicroBatch, ...]
    token_starts: IntArray
    is_task: npt.NDArray[np.bool_]
    blocks: tuple[tuple[PrefixBlock, ...], ...] = ()

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.is_task)

    @classmethod
    def prepare(
        cls, examples: EncodedExamples, device: torch.device, *, is_packed: bool = False
    ) -> ProbeSet:
        """Lay ``examples`` out in forward passes of about `PROBE_BATCH_TOKENS` tokens.

        Args:
            examples: N of them.
            device: Where the model is.
            is_packed: Whether the model's examples can be packed; then beginnings are shared.
        """
        starts = np.concatenate([[0], np.cumsum(examples.supervised_counts, dtype=np.int64)])
        limit = PROBE_BATCH_TOKENS.get(device.type, PROBE_BATCH_TOKENS["cpu"])
        if not is_packed:
            return cls(_by_length(examples, limit, device), starts, examples.is_task)
        rows = lay_out_groups(examples, group_by_prefix(examples), limit, device)
        batches, blocks = (tuple(row.tokens for row in rows), tuple(row.blocks for row in rows))
        return cls(batches, starts, examples.is_task, blocks)

    def measure(self, model: nn.Module, autocast: AbstractContextManager[object]) -> FloatArray:
        """Mean negative log-likelihood per supervised token of each example, in nats, shape (N,).

        Dropout is off while measuring.
        """
        return self.by_example(self.measure_tokens(model, autocast))

    def measure_tokens(
        self, model: nn.Module, autocast: AbstractContextManager[object]
    ) -> FloatArray:
        """Negative log-likelihood of every supervised token, in nats.

        Dropout is off while measuring.

        Returns:
            Shape (T,), example after example.
        """
        was_training = model.training
        model.eval()
        nll_T = np.empty(int(self.token_starts[-1]), dtype=np.float64)
        blocks = self.blocks or [()] * len(self.batches)
        with torch.no_grad(), autocast:
            for batch, shared in zip(self.batches, blocks, strict=True):
                with prefixes_attended(model, shared) if shared else nullcontext():
                    nll_S = supervised_nll(model, batch)
                nll_T[self._places(batch)] = nll_S.double().cpu().numpy()
        model.train(was_training)
        return nll_T

    def by_example(self, nll_T: FloatArray) -> FloatArray:
        """Means over the tokens of each example, shape (N,)."""
        if not self.num_examples:
            return np.empty(0)
        sums: FloatArray = np.add.reduceat(nll_T, self.token_starts[:-1])
        return sums / np.diff(self.token_starts)

    def _places(self, batch: MicroBatch) -> IntArray:
        """Where the supervised tokens of a batch stand among all T."""
        starts, ends = self.token_starts[batch.rows], self.token_starts[batch.rows + 1]
        ranges = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
        return np.concatenate(ranges)

    def task_loss(self, losses: FloatArray) -> float | None:
        """Mean of the task examples' losses, or None when there are no task examples."""
        return float(losses[self.is_task].mean()) if self.is_task.any() else None


class RememberedLosses:
    """Token losses of the last few untrained models, each measured once.

    Cells of one process begin with one base model and one probe set, and new adapters add zero to
    it: measured again, their losses would be the same bits.
    """

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._losses: OrderedDict[Hashable, FloatArray] = OrderedDict()

    def get(self, key: Hashable, measure: Callable[[], FloatArray]) -> FloatArray:
        """What ``measure`` gave when last called for this key, shape (T,), not to be written to.

        Args:
            key: All that decides the bits of the losses.
            measure: Called for a key that is not remembered.
        """
        if key not in self._losses:
            self._losses[key] = measure()
            self._losses[key].flags.writeable = False
        self._losses.move_to_end(key)
        while len(self._losses) > self._most:
            self._losses.popitem(last=False)
        return self._losses[key]


def _by_length(
    examples: EncodedExamples, max_tokens: int, device: torch.device
) -> tuple[MicroBatch, ...]:
    """Padded micro-batches of examples of similar length, at most ``max_tokens`` each."""
    parts = lay_out(examples.lengths, Limits("length_grouped", max_tokens=max_tokens))
    return tuple(collate(examples, part, device) for part in parts)


@dataclass(frozen=True)
class TracedTokens:
    """Supervised tokens whose own losses are kept.

    Attributes:
        places: Shape (S,), rising. Places among all T supervised tokens.
        examples: Shape (S,). Row of each in the probe set.
        positions: Shape (S,). Place in its response, from 0.
    """

    places: IntArray
    examples: IntArray
    positions: IntArray

    @classmethod
    def choose(cls, probe_set: ProbeSet, max_tokens: int) -> TracedTokens:
        """Draw ``max_tokens`` supervised tokens, or take all where there are no more.

        Uniform and without replacement, so that shares among them estimate shares among all; the
        seed is constant, so that every cell of an experiment traces the same tokens.
        """
        starts = probe_set.token_starts
        generator = np.random.default_rng(_TRACE_SEED)
        places = np.sort(generator.permutation(int(starts[-1]))[:max_tokens])
        examples = np.searchsorted(starts, places, side="right") - 1
        return cls(places, examples, places - starts[examples])


def save_probe(
    path: Path,
    steps: tuple[int, ...],
    losses: FloatArray,
    tokens: TracedTokens | None = None,
    token_losses: FloatArray | None = None,
) -> None:
    """Write probe losses, and those of single tokens where they were traced.

    Args:
        path: File to write.
        steps: P probe steps.
        losses: Shape (P, N). Losses of the probe examples.
        tokens: The S traced tokens.
        token_losses: Shape (P, S). Their losses; kept in single precision, with which they were
            computed.
    """
    arrays: dict[str, Any] = {"steps": np.asarray(steps, dtype=np.int64), "losses": losses}
    if tokens is not None and token_losses is not None:
        arrays |= {
            "token_losses": token_losses.astype(np.float32),
            "token_examples": tokens.examples.astype(np.int32),
            "token_positions": tokens.positions.astype(np.int32),
        }
    np.savez(path, **arrays)


def load_probe(path: Path) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Read the steps (P,) and losses (P, N) that `save_probe` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["steps"], arrays["losses"]
