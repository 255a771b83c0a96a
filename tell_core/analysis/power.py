"""Power: the smallest difference between two arms that so many seeds and items can show.

Two arms with the same S seeds and N items differ by a mean whose variance is the sum of a seed part
``2 seed_sd² / S`` and an item part ``item_difference_sd² / N``. The interval that judges it reaches
as far as Student's t with S - 1 degrees of freedom times the seed part *as those seeds show it*,
and the normal quantile times the item part, joined as the root of the sum of squares. The chance
that it leaves out 0 is averaged over what the seeds might show. Degrees of freedom of Welch and
Satterthwaite for both parts together would promise too much: a power of 0.65 instead of 0.8 with
three seeds where the item part is the larger.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from tell_core.analysis.curves import NO_SCORE, ONE_SEED, CurvePoint
from tell_core.analysis.leverage import common_seeds
from tell_core.evaluation.base import MeanMetric, Metric
from tell_core.spec.arms import SFT_ARMS

POWER = 0.8
_MIDPOINTS = (np.arange(512) + 0.5) / 512
_ONE_ITEM = "one item: how much another would change the score is unknown"
_NO_PAIR = "no SFT and TELL at one task budget with two seeds in common"
_NO_SPREAD = "neither seeds nor items differ: what others would show is unknown"
_Pair = tuple[CurvePoint, CurvePoint]  # arm `tell` and an SFT arm


class Noise(NamedTuple):
    """How far single seeds and items scatter on one metric.

    Attributes:
        seed_sd: Standard deviation over seeds of one training's score on the same items.
        item_difference_sd: Standard deviation over items of the difference between two arms.
    """

    seed_sd: float
    item_difference_sd: float


def half_width(noise: Noise, num_seeds: int, num_items: int, confidence: float) -> float | None:
    """Half the expected interval of a difference between two arms with equal seeds and items.

    Args:
        noise: Of the metric, in its units.
        num_seeds: S, of each arm.
        num_items: N, the same in both arms.
        confidence: Coverage of the interval.

    Returns:
        In units of the metric; None with one seed or one item, which give no interval.
    """
    if num_seeds < 2 or num_items < 2:
        return None
    tail = (1 + confidence) / 2
    from_seeds = stats.t.ppf(tail, num_seeds - 1) * noise.seed_sd * math.sqrt(2 / num_seeds)
    from_items = stats.t.ppf(tail, num_items - 1) * noise.item_difference_sd / math.sqrt(num_items)
    return float(math.hypot(from_seeds, from_items))


def smallest_difference(
    seed_sd: float,
    item_difference_sd: float,
    num_seeds: int,
    num_items: int,
    confidence: float = 0.95,
    power: float = POWER,
) -> float | None:
    """The difference between two arms that an interval leaves 0 out for with a chance of ``power``.

    Args:
        seed_sd: Standard deviation over seeds of one training's score on the same items; the two
            arms' seeds are taken as independent.
        item_difference_sd: Standard deviation over items of the difference between the arms.
        num_seeds: S, the same in both arms.
        num_items: N, the same in both arms.
        confidence: Coverage of the interval.
        power: The chance.

    Returns:
        The difference; None with one seed or one item, which show nothing at all.
    """
    if num_seeds < 2 or num_items < 2:
        return None
    from_seeds, from_items = 2 * seed_sd**2 / num_seeds, item_difference_sd**2 / num_items
    if from_seeds + from_items == 0:
        return 0.0
    tail = (1 + confidence) / 2
    seen = stats.chi2.ppf(_MIDPOINTS, num_seeds - 1) / (num_seeds - 1)
    seed_reach = stats.t.ppf(tail, num_seeds - 1) ** 2 * from_seeds * seen
    reach = np.sqrt(seed_reach + stats.t.ppf(tail, num_items - 1) ** 2 * from_items)
    scatter = math.sqrt(from_seeds + from_items)

    def missing(difference: float) -> float:
        return float(special.ndtr((difference - reach) / scatter).mean()) - power

    return float(optimize.brentq(missing, 0.0, reach.max() + 10 * scatter))


def measured_power(
    points: Sequence[CurvePoint],
    confidence: float,
    power: float = POWER,
    *,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """``power`` of a metric in leverage.json: from what the pairs of TELL and SFT really showed.

    Each task budget by itself, as noise may differ by orders of magnitude between them. Where one
    has several pairs of arm `tell` and an SFT arm, it is that of the best SFT, then the best TELL.

    Args:
        points: Of one metric.
        confidence: Coverage of the interval.
        power: The chance to see the difference.
        higher_is_better: Of the metric.
    """
    pairs = [pair for pair in _pairs(points) if len(pair[0].seeds) > 1]
    sign = 1.0 if higher_is_better else -1.0
    budgets = sorted({point.task_budget_tokens or 0 for point in points if point.arm == "tell"})
    return {
        "confidence": confidence,
        "power": power,
        "num_seeds": min((len(tell.seeds) for tell, _ in pairs), default=0),
        "num_items": points[0].num_items,
        "reason": None if pairs else _NO_PAIR,
        "by_task_budget": [
            {"task_budget_tokens": budget}
            | _power_of_pair(_best_pair(pairs, budget, sign), confidence, power)
            for budget in budgets
        ],
    }


def _best_pair(pairs: Sequence[_Pair], task_budget_tokens: int, sign: float) -> _Pair | None:
    """The pair at a task budget with the best SFT, then the best TELL; None without any."""

    def goodness(pair: _Pair) -> list[float]:
        means = [sign * float(point.scores.mean()) for point in reversed(pair)]
        return [mean if math.isfinite(mean) else -math.inf for mean in means]

    same = [pair for pair in pairs if pair[0].task_budget_tokens == task_budget_tokens]
    return max(same, key=goodness, default=None)


def _power_of_pair(pair: _Pair | None, confidence: float, power: float) -> dict[str, Any]:
    """The smallest difference by the noise of one pair, or a reason."""
    unknown = {"smallest_difference": None, "seed_sd": None, "item_difference_sd": None}
    if pair is None:
        return unknown | {"reason": _NO_PAIR}
    tell, sft = pair
    num_seeds, num_items = len(tell.seeds), tell.num_items
    seed_sd = float((tell.scores - sft.scores).std(ddof=1)) / math.sqrt(2)
    draws = tell.item_draws.mean(axis=0) - sft.item_draws.mean(axis=0)
    item_sd = float(draws.std(ddof=1)) * math.sqrt(num_items)
    reason = None
    if not math.isfinite(seed_sd + item_sd):
        reason = NO_SCORE
    elif num_items < 2:
        reason = _ONE_ITEM
    elif seed_sd + item_sd < 1e-12:
        reason = _NO_SPREAD
    if reason is not None:
        return unknown | {"reason": reason}
    return {
        "smallest_difference": smallest_difference(
            seed_sd, item_sd, num_seeds, num_items, confidence, power
        ),
        "seed_sd": seed_sd,
        "item_difference_sd": item_sd,
        "reason": None,
    }


def power_before_training(
    metric: Metric,
    num_items: int,
    num_seeds: int,
    noise: Noise | None = None,
    *,
    confidence: float = 0.95,
    power: float = POWER,
) -> dict[str, Any]:
    """What a design can show before anything is trained.

    Where an earlier run has measured the noise, that is what the number rests on. Else the item
    part is the worst that two independent arms can have on a metric with limits: half of the items
    at either end, in each arm other ones; arms that are paired on items seldom scatter so. Seed
    noise is left out then. The first makes the number too large, the second too small: it is no
    bound in either direction.

    Args:
        metric: The metric.
        num_items: Test items.
        num_seeds: Seeds of each arm.
        noise: What an earlier run showed, or None.
        confidence: Coverage of the interval.
        power: The chance to see the difference.

    Returns:
        ``confidence``, ``power``, ``num_seeds``, ``num_items``, ``smallest_difference`` or its
        ``reason``, and ``assumption``: what the number rests on.
    """
    entry: dict[str, Any] = {
        "confidence": confidence,
        "power": power,
        "num_seeds": num_seeds,
        "num_items": num_items,
        "smallest_difference": None,
        "reason": None,
        "assumption": None,
    }
    if num_seeds < 2:
        return entry | {"reason": ONE_SEED}
    if num_items < 2:
        return entry | {"reason": _ONE_ITEM}
    if noise is not None:
        found = smallest_difference(*noise, num_seeds, num_items, confidence, power)
        return entry | {
            "smallest_difference": found,
            "assumption": "seeds and items scatter as in the earlier run here",
        }
    span = metric.limits[1] - metric.limits[0]
    if not math.isfinite(span):
        reason = f"{metric.name} has no limits: how far items scatter shows in training alone"
        return entry | {"reason": reason}
    if not metric.has_item_scores:
        reason = f"{metric.name} is no mean over items: how far it scatters shows in training alone"
        return entry | {"reason": reason}
    found = smallest_difference(0.0, span / math.sqrt(2), num_seeds, num_items, confidence, power)
    items = "items scatter as widely as the metric allows, which paired arms seldom do"
    if not isinstance(metric, MeanMetric):
        items += ", and the score is near their mean"
    return entry | {
        "smallest_difference": found,
        "assumption": f"{items}; seed noise unknown and left out",
    }


def _pairs(points: Sequence[CurvePoint]) -> list[_Pair]:
    """Arm `tell` and each SFT arm at the same budgets, with the seeds that both have."""
    told = [point for point in points if point.arm == "tell"]
    plain = [point for point in points if point.arm in SFT_ARMS]
    matched = [
        (tell, sft)
        for tell in told
        for sft in plain
        if sft.task_budget_tokens == tell.task_budget_tokens
        and sft.general_budget_tokens in (None, tell.general_budget_tokens)
    ]
    shared = [(tell, sft, common_seeds([tell, sft])) for tell, sft in matched]
    return [(tell.select(seeds), sft.select(seeds)) for tell, sft, seeds in shared]
