"""Simulated studies: SFT and TELL on the same items and seeds, with a leverage ratio known."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tell_core.analysis.curves import CurvePoint, score_trainings
from tell_core.analysis.resampling import FloatArray, Resampling, item_weights

FAST = Resampling(num_draws=400)


@dataclass(frozen=True)
class Study:
    """A study to simulate.

    Item i of seed s at n task tokens has ability ``log(n / 15000) + difficulty_i + seed noise``;
    TELL has that of ``ratio * n``. Half of the seed variance is common to all cells of a seed,
    half is drawn anew for each. The score is a Bernoulli draw of the logistic of the ability
    (binary), or its log-sigmoid plus noise of 0.3 (continuous).

    Attributes:
        ratio: The leverage ratio.
        num_seeds: Trainings of each cell.
        num_items: Test items.
        is_binary: Which kind of score.
        seed_sd: Standard deviation over seeds, in units of log tokens.
        spacing: Factor between task budgets.
        budget: Index of TELL's budget among the six of SFT.
    """

    ratio: float = 5.0
    num_seeds: int = 5
    num_items: int = 300
    is_binary: bool = False
    seed_sd: float = 0.2
    spacing: float = 3.0
    budget: int = 1

    @property
    def budgets(self) -> FloatArray:
        return 1000 * self.spacing ** np.arange(6)

    def simulate(self, seed: int) -> tuple[CurvePoint, list[CurvePoint]]:
        """TELL at its budget, and the SFT curve."""
        generator = np.random.default_rng(seed)
        difficulty = generator.normal(0, 1.2, self.num_items)
        common = generator.normal(size=self.num_seeds)

        def scores(effective_tokens: float) -> FloatArray:
            own = generator.normal(size=self.num_seeds)
            noise = self.seed_sd * (common + own) / np.sqrt(2)
            ability = np.log(effective_tokens / 15_000) + difficulty + noise[:, None]
            if self.is_binary:
                return (generator.random(ability.shape) < 1 / (1 + np.exp(-ability))).astype(float)
            return -np.log1p(np.exp(-ability)) + generator.normal(0, 0.3, ability.shape)

        own_budget = float(self.budgets[self.budget])
        tell = point("tell", own_budget, scores(self.ratio * own_budget))
        return tell, [point("sft", budget, scores(budget)) for budget in self.budgets]


def point(
    arm: str,
    tokens: float,
    scores: FloatArray | Sequence[Sequence[float]],
    *,
    general_budget: int | None = None,
    resampling: Resampling = FAST,
) -> CurvePoint:
    """A point from the scores (S, N) of every seed and item."""
    values = np.asarray(scores, dtype=np.float64)
    weights = _weights(values.shape[1], resampling)
    means, draws = score_trainings([row[:, None] for row in values], weights, item_mean)
    return CurvePoint(
        arm=arm,
        task_budget_tokens=round(tokens),
        general_budget_tokens=general_budget,
        task_tokens=np.full(len(values), float(tokens)),
        seeds=tuple(range(len(values))),
        scores=means,
        item_draws=draws,
        num_items=values.shape[1],
    )


def flat_point(arm: str, tokens: float, score: float, num_seeds: int = 3) -> CurvePoint:
    """A point without any noise: every seed and item has the same score."""
    return point(arm, tokens, np.full((num_seeds, 10), score))


def item_mean(statistics: FloatArray, weights: FloatArray) -> FloatArray:
    """Scores of a metric that is the mean of one number per item."""
    return np.asarray((weights @ statistics)[:, 0] / weights.sum(axis=1))


@lru_cache(maxsize=4)
def _weights(num_items: int, resampling: Resampling) -> FloatArray:
    return item_weights(num_items, resampling)
