"""Anchor prompts compared on dev items: a choice on one half of them, its test on the other.

The best of several candidates looks better than it is on the items that it was chosen by. So the
choice is made on one half, and only what the other half says about it counts there: against no
anchor, against meaningless texts of equal length, and against the anchor that was given.

Shape letters: N items, T texts or trainings of one anchor, D draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tell_core.analysis.multiple import holm, two_sided_p_value
from tell_core.analysis.resampling import (
    FloatArray,
    Resampling,
    interval,
    item_weights,
    seed_deviations,
)

Verdict = Literal["adopt", "keep", "undetermined", "no candidate"]
MIN_SEEDS = 2
CANDIDATE, GIVEN, NONE, RANDOM = "candidate", "given", "no anchor", "random text"


class Difference(NamedTuple):
    """Score of an anchor minus that of another on the same items.

    Attributes:
        against: The other.
        estimate: In nats per token; above 0 is better.
        low: Lower end of its interval.
        high: Upper end.
        p_value: Two-sided, uncorrected.
        p_holm: After Holm's correction over the comparisons made together, or for all tries.
    """

    against: str
    estimate: float
    low: float | None
    high: float | None
    p_value: float
    p_holm: float


def compare(
    scores: FloatArray, others: Mapping[str, FloatArray], resampling: Resampling
) -> list[Difference]:
    """One anchor against others, items paired.

    Args:
        scores: Shape (T, N). Scores of the anchor, row by row of its trainings; one row where
            nothing was trained.
        others: The same of each other anchor. Where both have several rows these are paired.
        resampling: How intervals are drawn: items with replacement, rows from Student's t.
    """
    found = [_difference(name, scores, other, resampling) for name, other in others.items()]
    corrected = holm([one.p_value for one in found])
    return [
        one._replace(p_holm=float(p_holm or 0.0))
        for one, p_holm in zip(found, corrected, strict=True)
    ]


def across_tries(
    tested: Sequence[Difference], others: Sequence[float], num_tries: int
) -> list[Difference]:
    """The same comparisons, corrected for all tries: Holm over the comparisons of all, times tries.

    Who searches again until a candidate is adopted looks at p-values as often as there are tries.
    Holm's correction over all comparisons alone spends level / k on the k-th look, whose sum has no
    bound; level / k² sums up to 1.64 levels, however many tries there are. More tries never make a
    corrected p smaller.

    Args:
        tested: Comparisons of one try.
        others: Uncorrected p-values of every other comparison on the same items.
        num_tries: Tries on these items, this one counted.
    """
    corrected = holm([*(one.p_value for one in tested), *others])
    return [
        one._replace(p_holm=min(1.0, num_tries * float(p_holm or 0.0)))
        for one, p_holm in zip(tested, corrected, strict=False)
    ]


def _difference(
    name: str, scores: FloatArray, other: FloatArray, resampling: Resampling
) -> Difference:
    is_paired = len(scores) == len(other)
    rows = (
        scores - other if is_paired else scores.mean(axis=0) - other
    )  # one row has no spread of its own
    by_items = item_weights(rows.shape[1], resampling) @ rows.mean(axis=0) / rows.shape[1]
    draws = by_items + seed_deviations(len(rows), resampling) @ rows.mean(axis=1)
    low, high = interval(draws, draws, resampling.confidence)
    p_value = two_sided_p_value(draws, draws) if np.ptp(draws) > 0 else 1.0
    return Difference(name, float(rows.mean()), low, high, p_value, p_value)


def judge_search(tested: Sequence[Difference], confidence: float) -> tuple[Verdict, str]:
    """What to do with the chosen candidate, and why.

    It is adopted where it is shown to be better than no anchor, than random texts and than the
    given anchor, if there is one.

    Args:
        tested: Its differences on the items that it was not chosen by; none without a candidate.
        confidence: 1 minus the level of the tests.
    """
    if not tested:
        return "no candidate", "the base model wrote no text that may serve as an anchor prompt"
    is_shown = {one.against: one.p_holm <= 1 - confidence for one in tested}
    worse = [one.against for one in tested if is_shown[one.against] and one.estimate < 0]
    better = [one.against for one in tested if is_shown[one.against] and one.estimate > 0]
    open_ = [one.against for one in tested if not is_shown[one.against]]
    if worse:
        return "keep", f"the best candidate is worse than {' and '.join(worse)}"
    if open_:
        shown = f"; better than {' and '.join(better)}" if better else ""
        return "undetermined", f"not shown to differ from {' and '.join(open_)}{shown}"
    return "adopt", f"better than {', '.join(better)}"


def judge_training(
    tested: Sequence[Difference], confidence: float, num_seeds: int
) -> tuple[Verdict, str]:
    """What trainings with the chosen candidate and its controls say of it, and why.

    Args:
        tested: Differences of the trained candidate, as in `judge_search`.
        confidence: 1 minus the level of the tests.
        num_seeds: Trainings of each anchor. With one, intervals know nothing of the spread between
            seeds, and nothing is decided.
    """
    if num_seeds < MIN_SEEDS:
        return "undetermined", (
            "one seed: the spread between trainings is not known; give at least"
            f" {MIN_SEEDS} under `seeds`"
        )
    return judge_search(tested, confidence)


def as_rows(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """The differences as JSON."""
    return [one._asdict() for one in differences]
