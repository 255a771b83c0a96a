"""Quanta discovery of one model: tokens, gradients, clusters, and what may be said about them.

Shape letters: S tokens, D projected dimensions, E examples that push.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tell_core.analysis.quanta.clustering import (
    Clustering,
    IntArray,
    agreement,
    chance_p_value,
    cluster_gradients,
    null_agreements,
)
from tell_core.analysis.quanta.gradients import (
    Float32Array,
    ProjectedGradients,
    project_gradients,
)
from tell_core.analysis.quanta.projection import build_projection
from tell_core.analysis.quanta.ranks import RankVerdict, rank_verdict
from tell_core.analysis.quanta.tokens import (
    CEILING_NATS,
    FLOOR_NATS,
    INDUCTION_NGRAM,
    TokenSelection,
    select_tokens,
    token_samples,
)
from tell_core.data.encoding import EncodedExamples

Progress = Callable[[str, int, int], None]
# Fewer tokens show neither clusters nor how stable they are.
MIN_TOKENS = 20
_MAX_P_VALUE = 0.05


@dataclass(frozen=True)
class DiscoverySettings:
    """What decides the outcome of a discovery, apart from model and data.

    Attributes:
        num_tokens: Most tokens to look at.
        projection: How gradients are projected.
        num_dimensions: Dimensions of the projection.
        floor: Least loss of a token, in nats.
        ceiling: Largest loss of a token, in nats.
        ngram: Length of the n-gram of the induction filter; 0 switches it off.
        seed: Seed of choice, projection, subsamples and replicates.
    """

    num_tokens: int = 1000
    projection: Literal["countsketch", "rademacher", "kronecker"] = "countsketch"
    num_dimensions: int = 4096
    floor: float = FLOOR_NATS
    ceiling: float = CEILING_NATS
    ngram: int = INDUCTION_NGRAM
    seed: int = 0


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Attributes:
        settings: What it was found with.
        tokens: The tokens looked at.
        gradients: Their projected gradients.
        clustering: Their clusters, the candidate quanta.
        chance: Agreement of subsamples of vectors without clusters, each at its own best number.
        ranks: Verdict on rank and size.
        output_agreement: Agreement of the clusters with the output tokens.
        output_purity: Share of the tokens that are the commonest output of their cluster, over
            clusters of two tokens or more. Clusters may be finer than output tokens: then the
            agreement is low though each holds a single one.
        seconds: Wall seconds of "tokens", "gradients" and "clusters".
    """

    settings: DiscoverySettings
    tokens: TokenSelection
    gradients: ProjectedGradients
    clustering: Clustering
    chance: tuple[float, ...]
    ranks: RankVerdict
    output_agreement: float
    output_purity: float
    seconds: dict[str, float]

    @property
    def p_value(self) -> float:
        """How often subsamples agree as well on vectors without clusters."""
        return chance_p_value(self.clustering.agreement, self.chance)

    @property
    def has_clusters(self) -> bool:
        """Whether subsamples agree more than on vectors without clusters: p at most 0.05."""
        return self.p_value <= _MAX_P_VALUE

    @property
    def verdict(self) -> str:
        """In words: are there clusters, are they more than output tokens, is there a power law."""
        found = self.clustering
        if not self.has_clusters:
            clusters = (
                f"no evidence of clusters: subsamples agree to {found.agreement:.2f} on"
                f" {found.num_clusters}, and to {max(self.chance):.2f} where there are none"
                f" (p = {self.p_value:.2f})"
            )
        else:
            most = (
                " (the most that was tried)" if found.num_clusters == max(found.stability) else ""
            )
            clusters = (
                f"{found.num_clusters} candidate quanta{most}, on which subsamples agree to"
                f" {found.agreement:.2f} (without clusters: at most {max(self.chance):.2f},"
                f" p = {self.p_value:.2f});"
                f" {self.output_purity:.0%} of the tokens are the commonest output of their cluster"
                f" (agreement with the output tokens {self.output_agreement:.2f})"
            )
        return f"{clusters}. Power law of use: {self.ranks.verdict} ({self.ranks.reason})."

    def summary(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON takes it."""
        found = self.clustering
        return {
            "settings": asdict(self.settings),
            "verdict": self.verdict,
            "has_clusters": self.has_clusters,
            "tokens": self.tokens.counts,
            "num_backwards": self.gradients.num_backwards,
            "num_clusters": found.num_clusters,
            "agreement": found.agreement,
            "chance": list(self.chance),
            "p_value": self.p_value,
            "stability": {str(count): value for count, value in found.stability.items()},
            "output_agreement": self.output_agreement,
            "output_purity": self.output_purity,
            "ranks": self.ranks.as_json(),
            "seconds": self.seconds,
        }


def discover(
    model: nn.Module,
    examples: EncodedExamples,
    settings: DiscoverySettings,
    *,
    device: torch.device | None = None,
    on_progress: Progress | None = None,
) -> Discovery:
    """Find candidate quanta of a model on the supervised tokens of some examples.

    Args:
        model: Causal language model in float32 on ``device``; see `loading.load_subject`.
        examples: Where tokens are chosen from.
        settings: How.
        device: Where the model is; the CPU by default.
        on_progress: Called with phase, done and total.

    Raises:
        DataError: Too few tokens qualify.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "tokens"):
        tokens = select_tokens(
            model, examples,
            limit=settings.num_tokens, floor=settings.floor, ceiling=settings.ceiling,
            ngram=settings.ngram, at_least=MIN_TOKENS, seed=settings.seed, device=device,
            on_progress=_phase(on_progress, "losses"),
        )  # fmt: skip
    samples = token_samples(examples, tokens)
    projection = build_projection(settings.projection, settings.num_dimensions, settings.seed)
    with _timed(seconds, "gradients"):
        gradients = project_gradients(
            model, samples, projection, device=device, on_progress=_phase(on_progress, "gradients")
        )
    with _timed(seconds, "clusters"):
        vectors = gradients.vectors
        found = cluster_gradients(vectors, seed=settings.seed)
        chance = null_agreements(vectors, seed=settings.seed)
        ranks = rank_verdict(vectors, found.labels, seed=settings.seed)
    return Discovery(
        settings=settings,
        tokens=tokens,
        gradients=gradients,
        clustering=found,
        chance=tuple(chance),
        ranks=ranks,
        output_agreement=agreement(found.labels, output_tokens(samples)),
        output_purity=purity(found.labels, output_tokens(samples)),
        seconds=seconds,
    )


def output_tokens(samples: EncodedExamples) -> IntArray:
    """The last token of each sample, shape (S,)."""
    return np.asarray(samples.tokens[samples.offsets[1:] - 1], dtype=np.int64)


def purity(labels: IntArray, outputs: IntArray) -> float:
    """Share of samples with the commonest output of their cluster, single ones left out; 0 to 1."""
    groups = [outputs[labels == label] for label in np.unique(labels)]
    shared = [group for group in groups if len(group) > 1]
    commonest = sum(int(np.unique(group, return_counts=True)[1].max()) for group in shared)
    return commonest / max(1, sum(len(group) for group in shared))


def centres(vectors_SD: Float32Array, labels: IntArray) -> Float32Array:
    """Mean unit gradient of each cluster, shape (clusters, D)."""
    unit = vectors_SD / np.maximum(np.linalg.norm(vectors_SD, axis=1, keepdims=True), 1e-30)
    return np.stack([unit[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])


def pushes(centres_KD: Float32Array, gradients_ED: Float32Array) -> Float32Array:
    """How far a small step on an example lowers the loss of each cluster, relatively.

    Inner product of the example's gradient, per unit of its norm, with the cluster's mean
    direction: positive where a step on the example makes the cluster's tokens likelier.

    Returns:
        Shape (clusters, E), between -1 and 1.
    """
    norms = np.maximum(np.linalg.norm(gradients_ED, axis=1, keepdims=True), 1e-30)
    lengths = np.maximum(np.linalg.norm(centres_KD, axis=1, keepdims=True), 1e-30)
    return np.asarray((centres_KD / lengths) @ (gradients_ED / norms).T, dtype=np.float32)


def strongest(pushes_E: Sequence[float] | Float32Array, count: int) -> list[int]:
    """The examples with the largest positive push, strongest first."""
    order = np.argsort(-np.asarray(pushes_E), kind="stable")[:count]
    return [int(place) for place in order if pushes_E[place] > 0]


def _phase(on_progress: Progress | None, phase: str) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(phase, done, total)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note the wall seconds of a block under a name."""
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started
