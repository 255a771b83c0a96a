"""Token budgets: whole examples, nested, never over, and never filled by repetition.

Tokens here are whatever a budget is counted in (`budgets.unit`): all tokens of a rendered example,
or its supervised tokens only.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tell_core.data.encoding import IntArray
from tell_core.data.seeding import seeded_generator
from tell_core.errors import TokenBudgetError


def choice_order(num_examples: int, seed: int, purpose: str = "task") -> IntArray:
    """The seeded order in which examples of a pool are chosen.

    Args:
        num_examples: Size of the pool.
        seed: Seed of the permutation.
        purpose: Keeps the orders of different pools apart: "task", or the name of a source.

    Returns:
        Shape (N,). A permutation of 0 to N - 1.
    """
    return seeded_generator(seed, f"choice of {purpose}").permutation(num_examples)


def stratified_order(strata: Sequence[str] | npt.NDArray[np.str_], seed: int) -> IntArray:
    """A seeded order of choice in which every beginning holds each stratum in proportion.

    Among the first k examples a stratum with a share p of the pool has between p k - 1 and p k + 1,
    for every k at once: Tijdeman's chairman assignment (1980), the earliest deadline first. Which
    examples of a stratum come first is drawn by seed, and so is which of two strata with the same
    deadline goes first.

    Args:
        strata: Length N. Stratum of each example.
        seed: Seed of the order.

    Returns:
        Shape (N,). A permutation of 0 to N - 1.
    """
    names, stratum_of = np.unique(np.asarray(strata), return_inverse=True)
    shuffled = choice_order(len(stratum_of), seed)
    members = shuffled[np.argsort(stratum_of[shuffled], kind="stable")]
    sizes = np.bincount(stratum_of, minlength=len(names))
    places = np.concatenate([np.arange(size) for size in sizes])
    releases, deadlines = _time_windows(np.repeat(sizes, sizes), places, len(names))
    ranks = seeded_generator(seed, "order of strata").permutation(len(names))
    jobs = zip(
        releases.tolist(),
        deadlines.tolist(),
        np.repeat(ranks, sizes).tolist(),
        members.tolist(),
        strict=True,
    )
    waiting = sorted(jobs, reverse=True)
    ready: list[tuple[int, int, int]] = []
    order = []
    for step in range(1, len(members) + 1):
        while waiting and waiting[-1][0] <= step:
            heapq.heappush(ready, waiting.pop()[1:])
        order.append(heapq.heappop(ready)[2])
    return np.asarray(order, dtype=np.int64)


def _time_windows(sizes: IntArray, places: IntArray, num_strata: int) -> tuple[IntArray, IntArray]:
    """First and last position, from 1, at which each example may stand.

    With a share p = size / N and the slack d = 1 / (2 S - 2) for S strata, the j-th example of a
    stratum (j from 1) may not come before (j - 1 + d) / p nor after (j - d) / p + 1. Numbers are
    whole, multiplied by 2 S - 2.
    """
    if num_strata == 1:
        return places + 1, places + 1
    parts = 2 * num_strata - 2
    scaled, total = parts * sizes.astype(np.int64), len(sizes)
    releases = -(-(parts * places + 1) * total // scaled)
    deadlines = (parts * (places + 1) - 1) * total // scaled + 1
    return releases, deadlines


def select_within_budget(
    token_counts: IntArray,
    budget: int,
    seed: int,
    purpose: str = "task",
    *,
    order: IntArray | None = None,
) -> IntArray:
    """Choose whole examples in a seeded order until the next one would exceed the budget.

    Nested for a fixed seed: a smaller budget's choice is a prefix of a larger one's. A budget
    beyond the pool chooses all of it.

    Args:
        token_counts: Shape (N,), N >= 1. Tokens per example, each at least 1.
        budget: Upper bound on the sum of chosen counts, in tokens.
        seed: Seed of the permutation that fixes the order of choice.
        purpose: Keeps the orders of different pools apart.
        order: Shape (N,). Another order of choice, such as `stratified_order`.

    Returns:
        Shape (K,), 1 <= K <= N. Indices into ``token_counts``, in order of choice.

    Raises:
        TokenBudgetError: The first example drawn is larger than ``budget``.
    """
    order = choice_order(len(token_counts), seed, purpose) if order is None else order
    used = np.cumsum(token_counts[order], dtype=np.int64)
    chosen = order[: int(np.searchsorted(used, budget, side="right"))]
    if len(chosen) == 0:
        raise TokenBudgetError(
            f"a budget of {budget} tokens holds no example of {purpose}: the first one drawn with"
            f" seed {seed} has {int(used[0])} tokens. Give at least that many, or lower"
            " `curation.max_tokens`."
        )
    return chosen


def split_budget(
    budget: int, weights: Sequence[float], available_tokens: Sequence[int]
) -> list[int]:
    """Split a budget over sources by weight; what a source cannot supply goes to the others.

    The remainder rule: each source gets ``min(available, level * weight)`` rounded down, with one
    level for all that is raised until the budget is spent, so that what a source cannot supply goes
    to the others by their weights, and no share falls when the budget grows. What rounding leaves
    over, fewer tokens than there are sources, stays unused; so does what is left of a share when
    its next example is longer.

    Args:
        budget: Tokens to split.
        weights: Relative shares, each above zero.
        available_tokens: Tokens that each source holds.

    Returns:
        Tokens per source; their sum is at most ``budget``.
    """
    shares = [Fraction(0)] * len(weights)
    left = Fraction(budget)
    open_sources = list(range(len(weights)))
    while open_sources:
        level = left / sum(Fraction(weights[source]) for source in open_sources)
        full = [s for s in open_sources if available_tokens[s] <= level * Fraction(weights[s])]
        for source in full or open_sources:
            share = level * Fraction(weights[source])
            shares[source] = min(share, Fraction(available_tokens[source]))
        if not full:
            break
        left -= sum(shares[source] for source in full)
        open_sources = [source for source in open_sources if source not in full]
    return [int(share) for share in shares]


def source_shares(
    token_counts: IntArray,
    source_names: Sequence[str] | npt.NDArray[np.str_],
    weights: Mapping[str, float],
    budget: int,
) -> dict[str, int]:
    """What each source with examples may use of a budget, by `split_budget`.

    Args:
        token_counts: Shape (N,). Tokens per example.
        source_names: Length N. Source of each example.
        weights: Relative share of each source.
        budget: Upper bound over all sources, in tokens.
    """
    available = available_tokens(token_counts, source_names, weights)
    shares = split_budget(budget, [weights[name] for name in available], list(available.values()))
    return dict(zip(available, shares, strict=True))


def available_tokens(
    token_counts: IntArray,
    source_names: Sequence[str] | npt.NDArray[np.str_],
    weights: Iterable[str],
) -> dict[str, int]:
    """Tokens that each source holds; sources without examples are left out.

    Args:
        token_counts: Shape (N,). Tokens per example.
        source_names: Length N. Source of each example.
        weights: Names of the sources, in the order of the result.
    """
    names = np.asarray(source_names)
    tokens = {name: token_counts[names == name] for name in weights}
    return {name: int(counts.sum()) for name, counts in tokens.items() if len(counts)}


def select_from_sources(
    token_counts: IntArray,
    source_names: Sequence[str] | npt.NDArray[np.str_],
    weights: Mapping[str, float],
    budget: int,
    seed: int,
) -> IntArray:
    """Choose examples of several sources within one budget, each source in its own order.

    The budget is split by `split_budget`; within its share each source chooses as
    `select_within_budget` does, so that the whole choice is nested too. A source whose share is
    smaller than its first example adds nothing.

    Args:
        token_counts: Shape (N,). Tokens per example.
        source_names: Length N. Source of each example.
        weights: Relative share of each source.
        budget: Upper bound on the sum of chosen counts, in tokens.
        seed: Seed of the orders of choice.

    Returns:
        Shape (K,), K >= 1. Indices into ``token_counts``, source by source in order of choice.

    Raises:
        TokenBudgetError: No source's share holds its first example.
    """
    names = np.asarray(source_names)
    chosen, refusals = [], []
    for name, share in source_shares(token_counts, names, weights, budget).items():
        rows = np.flatnonzero(names == name)
        try:
            chosen.append(rows[select_within_budget(token_counts[rows], share, seed, name)])
        except TokenBudgetError as error:
            refusals.append(error)
    if not chosen:
        raise TokenBudgetError(
            f"a general budget of {budget} tokens holds no example: {refusals[0]}"
            if refusals
            else "there are no general examples to choose from."
        )
    return np.concatenate(chosen)
