"""Multitask sparse parity: a learning problem whose quanta are known, as a control of emergence.

An input names one of K subtasks and carries n random bits; the answer is the parity of the k bits
that belong to the subtask. Subtask number j is drawn with probability proportional to
j ** -(alpha + 1), so the quanta and their use frequencies are given. Each one's loss stays at
log 2 nats and then falls in a step; the mean over subtasks falls smoothly. Source: arXiv
2303.13506, section 3.

Two hidden layers of its size would learn more subtasks; one is kept, as in the paper. The first
layer reads the name of the subtask as a row of a table, which is what a one-hot input times a
matrix is, at a fraction of the cost.

Shape letters: B examples of a batch, K subtasks, n bits, k bits of a subtask, W width, P probes.
"""

import math
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tell_core.analysis.power_law import zipf_frequencies
from tell_core.analysis.resampling import FloatArray
from tell_core.errors import AnalysisError, InputError

IntArray = npt.NDArray[np.int64]

LOG_2 = math.log(2)
"""Loss in nats of a subtask that is not learned."""


@dataclass(frozen=True)
class ParitySetting:
    """A sparse parity problem and how a network is trained on it.

    Attributes:
        num_subtasks: K.
        num_bits: n.
        subset_size: k.
        alpha: Exponent of the use frequencies, minus 1.
        width: Hidden units.
        batch_size: Examples of a step; every step draws new ones.
        num_steps: Optimiser steps.
        optimiser: How steps are taken.
        learning_rate: Size of the steps.
        num_probes: Logarithmically spaced steps at which the loss of every subtask is measured.
        probe_examples: Examples per subtask for that.
    """

    num_subtasks: int = 100
    num_bits: int = 16
    subset_size: int = 2
    alpha: float = 0.4
    width: int = 256
    batch_size: int = 1000
    num_steps: int = 6000
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    num_probes: int = 80
    probe_examples: int = 100

    def __post_init__(self) -> None:
        """Refuse a problem with fewer subsets than subtasks: two subtasks would be one."""
        if math.comb(self.num_bits, self.subset_size) < self.num_subtasks:
            raise AnalysisError(
                f"{self.num_bits} bits have {math.comb(self.num_bits, self.subset_size)} subsets of"
                f" {self.subset_size}, fewer than the {self.num_subtasks} subtasks: use more bits"
            )


@dataclass(frozen=True)
class ParityRun:
    """What one training on sparse parity left behind.

    Attributes:
        setting: The problem.
        frequencies: Shape (K,). Use frequency of each subtask, falling.
        steps: Shape (P,). Steps done at each probe, rising from 1.
        losses: Shape (P, K). Loss of each subtask, in nats.
    """

    setting: ParitySetting
    frequencies: FloatArray
    steps: IntArray
    losses: FloatArray

    @property
    def mean_loss(self) -> FloatArray:
        """Shape (P,). Loss over the distribution of subtasks."""
        return np.asarray(self.losses @ self.frequencies)


def read_parity(path: Path) -> tuple[ParitySetting, tuple[int, ...]]:
    """A problem and the seeds to train it with, from YAML: the fields of the setting, and `seeds`.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value has the wrong type.
        AnalysisError: The problem has too few subsets.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        seeds = TypeAdapter(tuple[int, ...]).validate_python(fields.pop("seeds", (0,)))
        known = [field.name for field in dataclass_fields(ParitySetting)]
        if unknown := sorted(set(fields) - set(known)):
            raise InputError(f"{path}: unknown key {unknown[0]!r}; there are {', '.join(known)}")
        return TypeAdapter(ParitySetting).validate_python(fields), seeds
    except (OSError, AttributeError, TypeError, yaml.YAMLError, ValidationError) as error:
        raise InputError(
            f"{path} holds no sparse parity problem: {error}. See configs/parity.yaml"
        ) from error


class ParityNetwork(nn.Module):
    """One hidden layer of rectified units over the subtask's name and the bits."""

    def __init__(self, setting: ParitySetting) -> None:
        super().__init__()
        self.names = nn.Embedding(setting.num_subtasks, setting.width)
        self.bits = nn.Linear(setting.num_bits, setting.width)
        self.answer = nn.Linear(setting.width, 2)
        # As a dense layer over one-hot names and bits together would be initialised.
        bound = (setting.num_subtasks + setting.num_bits) ** -0.5
        for weight in (self.names.weight, self.bits.weight, self.bits.bias):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, names_B: torch.Tensor, bits_Bn: torch.Tensor) -> torch.Tensor:
        """Logits of the two answers, shape (B, 2)."""
        hidden_BW = F.relu(self.names(names_B) + self.bits(bits_Bn))
        logits: torch.Tensor = self.answer(hidden_BW)
        return logits


def train_parity(setting: ParitySetting, seed: int) -> ParityRun:
    """Train a network on sparse parity and trace the loss of every subtask; CPU, one thread.

    Args:
        setting: The problem.
        seed: Seed of the subsets, the initial weights and the examples.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _train(setting, seed)
    finally:
        torch.set_num_threads(threads)


def _train(setting: ParitySetting, seed: int) -> ParityRun:
    subsets_Kk = draw_subsets(setting, seed)
    frequencies = zipf_frequencies(setting.num_subtasks, setting.alpha)
    cumulative = torch.from_numpy(np.cumsum(frequencies))
    model = ParityNetwork(setting)
    optimiser = _optimiser(model, setting)
    names = torch.arange(setting.num_subtasks).repeat_interleave(setting.probe_examples)
    probe = _examples(names, subsets_Kk, setting.num_bits)
    due = set(_probe_steps(setting).tolist())
    losses = []
    for step in range(1, setting.num_steps + 1):
        drawn = torch.rand(setting.batch_size, dtype=torch.float64)
        names_B = torch.searchsorted(cumulative, drawn).clamp_(max=setting.num_subtasks - 1)
        bits_Bn, answers_B = _examples(names_B, subsets_Kk, setting.num_bits)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(names_B, bits_Bn), answers_B).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step in due:
            losses.append(_subtask_losses(model, names, *probe, setting.num_subtasks))
    return ParityRun(setting, frequencies, _probe_steps(setting), np.stack(losses))


def draw_subsets(setting: ParitySetting, seed: int) -> torch.Tensor:
    """The bits of each subtask, shape (K, k): different subsets, drawn without replacement."""
    subsets = list(combinations(range(setting.num_bits), setting.subset_size))
    chosen = np.random.default_rng(seed).permutation(len(subsets))[: setting.num_subtasks]
    return torch.tensor([subsets[place] for place in chosen])


def _optimiser(model: nn.Module, setting: ParitySetting) -> torch.optim.Optimizer:
    if setting.optimiser == "sgd":
        return torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    return torch.optim.Adam(model.parameters(), lr=setting.learning_rate)


def _examples(
    names_B: torch.Tensor, subsets_Kk: torch.Tensor, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits (B, n) and the parities (B,) that the named subtasks ask for."""
    bits_Bn = torch.randint(0, 2, (len(names_B), num_bits))
    answers_B = bits_Bn.gather(1, subsets_Kk[names_B]).sum(dim=1) % 2
    return bits_Bn.float(), answers_B


def _subtask_losses(
    model: nn.Module,
    names: torch.Tensor,
    bits: torch.Tensor,
    answers: torch.Tensor,
    num_subtasks: int,
) -> FloatArray:
    with torch.no_grad():
        losses = F.cross_entropy(model(names, bits), answers, reduction="none")
    return losses.reshape(num_subtasks, -1).double().mean(dim=1).numpy()


def _probe_steps(setting: ParitySetting) -> IntArray:
    spaced = np.geomspace(1, setting.num_steps, setting.num_probes)
    return np.unique(np.round(spaced).astype(np.int64))
