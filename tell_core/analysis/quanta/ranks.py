"""Is the size of clusters a power of their rank, as the quantization hypothesis has it?

The envelope of rank-size curves over many numbers of clusters has a slope near -1.2 even for random
vectors, so a slope says nothing by itself. It is compared with
replicates without clusters, cut and fitted in the same way, and the sizes must fit a power law
better than a lognormal. Anything less is "no evidence".

Shape letters: S samples, D dimensions, R null replicates.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from tell_core.analysis.quanta.clustering import (
    DRAW_SHARE,
    NUM_DRAWS,
    Array,
    FloatArray,
    IntArray,
    cosine_distances,
    cut,
    draws_of,
    tree_of,
)
from tell_core.analysis.quanta.nulls import NULL_KINDS, structureless

NUM_NULL_REPLICATES = 20
CONFIDENCE = 0.95
# Fewest clusters a law is fitted to; below, neither law can be told from the other.
MIN_CLUSTERS = 10
_NUM_COUNTS = 16
EVIDENCE, NO_EVIDENCE = "evidence", "no evidence"


@dataclass(frozen=True)
class RankVerdict:
    """What rank and size of clusters say about a power law of use.

    Attributes:
        verdict: "evidence" or "no evidence".
        reason: Why, in words.
        slope: Slope of log size over log rank of the envelope.
        low: Lower end of its interval.
        high: Upper end.
        null_slopes: Slopes of R isotropic, then R equally-shaped, replicates without clusters.
        likelihood_ratio: Normalised log-likelihood ratio of power law over lognormal, or None.
        p_value: Of that ratio, or None.
        counts: Numbers of clusters under the envelope.
        window: First and last rank of the fit.
        envelope: Largest size at each rank, from rank 1.
    """

    verdict: str
    reason: str
    slope: float
    low: float
    high: float
    null_slopes: tuple[float, ...]
    likelihood_ratio: float | None
    p_value: float | None
    counts: tuple[int, ...]
    window: tuple[int, int]
    envelope: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return asdict(self)


def rank_verdict(
    vectors_SD: Array,
    labels: IntArray,
    *,
    num_replicates: int = NUM_NULL_REPLICATES,
    seed: int = 0,
) -> RankVerdict:
    """Look for a power law in the sizes of clusters; "no evidence" unless everything speaks for it.

    Both kinds of vectors without clusters are tried (see `nulls.structureless`).

    Args:
        vectors_SD: Shape (S, D). Gradients, or projections of them.
        labels: Shape (S,). Clusters that the laws are fitted to.
        num_replicates: R of either kind.
        seed: Seed of replicates and subsamples.
    """
    num_samples = len(vectors_SD)
    counts, window = _counts(num_samples), _window(num_samples)
    distances = cosine_distances(vectors_SD)
    envelope = _envelope(distances, counts)
    slope = _slope(envelope, window)
    half = _half_width(distances, counts, window, seed)
    nulls = [
        _slope(_envelope(cosine_distances(vectors), counts), window)
        for kind in NULL_KINDS
        for vectors in structureless(vectors_SD, kind, num_replicates, seed)
    ]
    ratio, p_value, why_not = _against_lognormal(np.bincount(labels))
    reason = _against_evidence((slope - half, slope + half), nulls, ratio, p_value) or why_not
    return RankVerdict(
        verdict=NO_EVIDENCE if reason else EVIDENCE,
        reason=reason
        or f"steeper or flatter than all {len(nulls)} replicates without clusters, and a power law"
        " fits better than a lognormal",
        slope=slope,
        low=slope - half,
        high=slope + half,
        null_slopes=tuple(nulls),
        likelihood_ratio=ratio,
        p_value=p_value,
        counts=tuple(counts),
        window=window,
        envelope=tuple(envelope.tolist()),
    )


def _counts(num_samples: int) -> list[int]:
    """Numbers of clusters under the envelope: a logarithmic grid up to a quarter of S."""
    last = max(4, num_samples // 4)
    return sorted({int(count) for count in np.geomspace(4, last, _NUM_COUNTS).round()})


def _window(num_samples: int) -> tuple[int, int]:
    """Ranks of the fit: from a hundredth to a tenth of S, the window of arXiv 2303.13506."""
    first = max(2, num_samples // 100)
    return first, max(first + 3, num_samples // 10)


def _envelope(distances: FloatArray, counts: Sequence[int]) -> IntArray:
    """Largest size at each rank over all the cuts, shape (largest number of clusters,)."""
    tree = tree_of(distances)
    envelope = np.zeros(max(counts), dtype=np.int64)
    for count in counts:
        sizes = np.sort(np.bincount(cut(tree, count)))[::-1]
        envelope[: len(sizes)] = np.maximum(envelope[: len(sizes)], sizes)
    return envelope


def _slope(envelope: IntArray, window: tuple[int, int]) -> float:
    ranks = np.arange(window[0], min(window[1], len(envelope)) + 1)
    sizes = np.maximum(envelope[ranks - 1], 1)
    return float(np.polyfit(np.log(ranks), np.log(sizes), 1)[0])


def _half_width(
    distances: FloatArray, counts: Sequence[int], window: tuple[int, int], seed: int
) -> float:
    """Half the slope's interval, by a delete-d jackknife over samples (Shao and Wu 1989)."""
    slopes = [
        _slope(_envelope(distances[np.ix_(draw, draw)], counts), window)
        for draw in draws_of(len(distances), NUM_DRAWS, seed)
    ]
    inflation = np.sqrt(DRAW_SHARE / (1 - DRAW_SHARE))
    quantile = float(norm.ppf(0.5 + CONFIDENCE / 2))
    return quantile * float(inflation * np.std(slopes, ddof=1))


def _against_lognormal(sizes: IntArray) -> tuple[float | None, float | None, str]:
    """Power law against lognormal on cluster sizes: ratio, its p-value; or why there is none.

    The search for the smallest size is kept from throwing away all but a few clusters.
    """
    import powerlaw

    ordered = np.sort(sizes)[::-1]
    if len(ordered) < MIN_CLUSTERS or ordered[0] == ordered[-1]:
        return None, None, f"{len(ordered)} clusters are too few, or too equal, to fit a law to"
    smallest = int(ordered[MIN_CLUSTERS - 1])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                limits = (1, smallest) if smallest > 1 else 1
                fit = powerlaw.Fit(ordered, discrete=True, xmin=limits, verbose=False)
                ratio, p_value = fit.distribution_compare(
                    "power_law", "lognormal", normalized_ratio=True
                )
    except ValueError as error:  # no smallest size leaves enough to fit to
        return None, None, f"no law can be fitted to the sizes of the clusters ({error})"
    if not np.isfinite(ratio) or not np.isfinite(p_value):
        return None, None, "the likelihoods of power law and lognormal cannot be compared"
    return float(ratio), float(p_value), ""


def _against_evidence(
    interval: tuple[float, float],
    null_slopes: Sequence[float],
    ratio: float | None,
    p_value: float | None,
) -> str:
    """What speaks against a power law, in words; empty when nothing does."""
    low, high = interval
    inside = sum(low <= slope <= high for slope in null_slopes)
    if inside:
        return f"{inside} of {len(null_slopes)} replicates without clusters have such a slope"
    if ratio is None or p_value is None:
        return ""
    if ratio <= 0 or p_value >= 1 - CONFIDENCE:
        return f"a power law fits no better than a lognormal (ratio {ratio:.2f}, p {p_value:.2f})"
    return ""
