"""Token budgets: whole examples, nested, never over, and never filled by repetition."""

from collections.abc import Sequence
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


def select_within_budget(
    token_counts: IntArray, budget: int, seed: int, purpose: str = "task"
) -> IntArray:
    """Choose whole examples in a seeded order until the next one would exceed the budget.

    Nested for a fixed seed: a smaller budget's choice is a prefix of a larger one's. A budget
    beyond the pool chooses all of it.

    Args:
        token_counts: Shape (N,), N >= 1. Tokens per example, each at least 1.
        budget: Upper bound on the sum of chosen counts, in tokens.
        seed: Seed of the permutation that fixes the order of choice.
        purpose: Keeps the orders of different pools apart.

    Returns:
        Shape (K,), 1 <= K <= N. Indices into ``token_counts``, in order of choice.

    Raises:
        TokenBudgetError: The first example drawn is larger than ``budget``.
    """
    order = choice_order(len(token_counts), seed, purpose)
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

    Each source gets ``min(available, level * weight)`` rounded down, with one level for all, so
    that no share falls when the budget grows. What rounding leaves over, fewer tokens than there
    are sources, stays unused.

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


def select_from_sources(
    token_counts: IntArray,
    source_names: Sequence[str] | npt.NDArray[np.str_],
    weights: dict[str, float],
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
    pools = {name: np.flatnonzero(names == name) for name in weights}
    pools = {name: rows for name, rows in pools.items() if len(rows)}
    available = [int(token_counts[rows].sum()) for rows in pools.values()]
    shares = split_budget(budget, [weights[name] for name in pools], available)
    chosen, refusals = [], []
    for (name, rows), share in zip(pools.items(), shares, strict=True):
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
