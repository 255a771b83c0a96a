"""Learning times of several trainings side by side, regressed on what may decide them.

Shape letters: U observations, D draws, Q coefficients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tell_core.analysis.resampling import FloatArray, Resampling, seed_deviations
from tell_core.analysis.run_cells import component_of
from tell_core.analysis.sequence import (
    IntArray,
    LearningTimes,
    censored_regression,
    cluster_weights,
)
from tell_core.analysis.verdicts import Component
from tell_core.errors import AnalysisError

_NUM_CLUSTER_DRAWS = 300


class Observations(NamedTuple):
    """Learning times of the units of several trainings, side by side.

    Attributes:
        times: U learning times.
        clusters: Shape (U,). Which observations are drawn together.
        seeds: Shape (U,). Seed of the training.
    """

    times: LearningTimes
    clusters: IntArray
    seeds: IntArray


def joined(parts: Sequence[LearningTimes]) -> LearningTimes:
    """The units of several trainings, one after another."""
    return LearningTimes(
        *(
            np.concatenate(columns)
            for columns in zip(*(vars(p).values() for p in parts), strict=True)
        )
    )


def coefficient(
    name: str,
    observed: Observations,
    design: FloatArray,
    place: int,
    resampling: Resampling,
    sign: float = 1.0,
) -> Component:
    """One coefficient of a censored regression of log time.

    Clusters are drawn with replacement, and seeds from Student's t, as everywhere.
    """

    def fitted(weights: FloatArray) -> float:
        chosen = weights > 0
        times = observed.times.select(chosen)
        fit = censored_regression(
            times.log_times, design[chosen], times.is_learned, weights[chosen]
        )
        return sign * float(fit.coefficients[place])

    drawn = cluster_weights(observed.clusters, _NUM_CLUSTER_DRAWS, resampling.seed)
    estimate, by_clusters = fitted(drawn[0]), []
    for weights in drawn[1:]:
        try:
            by_clusters.append(fitted(weights))
        except AnalysisError:
            continue  # a draw without one of the groups says nothing
    seeds = np.unique(observed.seeds)
    per_seed = np.array([fitted((observed.seeds == seed).astype(np.float64)) for seed in seeds])
    deviations = np.array(by_clusters) - np.mean(by_clusters)
    deviations += (
        seed_deviations(len(seeds), resampling._replace(num_draws=len(deviations))) @ per_seed
    )
    return component_of(
        name, np.concatenate([[estimate], estimate + deviations]), resampling.confidence
    )
