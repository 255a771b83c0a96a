"""Where the scatter of a score comes from: test items, training seed, decoding.

Each number is a standard deviation of the score of *one* training when one thing is drawn anew and
the other two stay. For the score of item i, seed s and decoding r as
``mean + item_i + seed_s + both_is + decoding_isr``, averaged over N items:

- ``item_sd``: other items, the same training. Variance (var item + var both) / N. From the
  bootstrap over items of each seed, averaged over seeds.
- ``seed_sd``: another seed, the same items. Variance var seed + var both / N. From the scatter of
  the seeds' scores. All seeds share the items, so the item variance is no part of that scatter and
  nothing is taken off for it.
- ``decoding_sd``: another decoding by the same training of the same items. From repeats.

What one decoding adds to the first two is taken off where it is known, at most down to 0; where it
is not known it is part of both. ``both``, by which seeds differ item by item, belongs to both of
the first two: their squares must not be added up to a total.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tell_core.analysis.curves import NO_SCORE, ONE_SEED, CurvePoint

CONSTANT = "the metric is constant: every item, seed and draw has the same score"
_NOT_TRAINED = "no training: there is no seed to draw anew"
_ONE_ITEM = "one item: how much another would change the score is unknown"
_DECODED_ONCE = "decoded once: set `evaluation.num_repeats` to 2 or more to measure it"


def variance_row(
    point: CurvePoint, repeats: Sequence[Sequence[float]], *, is_generated: bool
) -> dict[str, Any]:
    """One entry of ``variance`` in leverage.json.

    Args:
        point: Scores of all seeds of one arm at its budgets.
        repeats: For each seed the scores of repeated decodings; fewer than two show nothing.
        is_generated: Whether the metric looks at generated text; else decoding has no part in it.

    Returns:
        The three standard deviations, null where unknown, then with a reason.
    """
    decoding, why_no_decoding = _decoding_variance(repeats, is_generated)
    item, why_no_item = _item_variance(point)
    seed, why_no_seed = _seed_variance(point)
    reasons = dict.fromkeys(
        reason for reason in (why_no_item, why_no_seed, why_no_decoding) if reason
    )
    return {
        "arm": point.arm,
        "task_budget_tokens": point.task_budget_tokens,
        "general_budget_tokens": point.general_budget_tokens,
        "num_items": point.num_items,
        "num_seeds": len(point.seeds),
        "num_repeats": min((len(scores) for scores in repeats), default=0) or 1,
        "item_sd": _rest(item, decoding),
        "seed_sd": _rest(seed, decoding),
        "decoding_sd": None if decoding is None else decoding**0.5,
        "reason": "; ".join(reasons) or None,
    }


def _item_variance(point: CurvePoint) -> tuple[float | None, str | None]:
    """Bootstrap variance of one training's score, enlarged as that of a sample is."""
    if point.num_items < 2:
        return None, _ONE_ITEM
    if not (np.isfinite(point.scores).all() and np.isfinite(point.item_draws).all()):
        return None, NO_SCORE
    if _is_constant(point):
        return None, CONSTANT
    variance = point.item_draws.var(axis=1, ddof=1).mean()
    return float(variance * point.num_items / (point.num_items - 1)), None


def _seed_variance(point: CurvePoint) -> tuple[float | None, str | None]:
    if not point.varies_with_seed:
        return None, _NOT_TRAINED
    if len(point.seeds) < 2:
        return None, ONE_SEED
    if not np.isfinite(point.scores).all():
        return None, NO_SCORE
    if _is_constant(point):
        return None, CONSTANT
    return float(point.scores.var(ddof=1)), None


def _decoding_variance(
    repeats: Sequence[Sequence[float]], is_generated: bool
) -> tuple[float | None, str | None]:
    if not is_generated:
        return 0.0, None
    if not repeats or min(len(scores) for scores in repeats) < 2:
        return None, _DECODED_ONCE
    variances = [np.var(scores, ddof=1) for scores in repeats]
    mean = float(np.mean(variances))
    return (mean, None) if np.isfinite(mean) else (None, NO_SCORE)


def _is_constant(point: CurvePoint) -> bool:
    return bool(np.ptp(point.scores) == 0 and np.ptp(point.item_draws) < 1e-12)


def _rest(variance: float | None, decoding: float | None) -> float | None:
    """Standard deviation without the part of decoding, where that is known."""
    return None if variance is None else max(variance - (decoding or 0.0), 0.0) ** 0.5
