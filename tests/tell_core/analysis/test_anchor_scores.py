import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.anchor_scores import (
    Difference,
    across_tries,
    compare,
    judge_search,
    judge_training,
)
from tell_core.analysis.resampling import Resampling

HOW = Resampling(num_draws=400)


def scores(mean: float, num_rows: int = 1, num_items: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.3, (num_rows, num_items))


def difference(against: str, estimate: float, p_value: float) -> Difference:
    return Difference(against, estimate, None, None, p_value, p_value)


@given(st.integers(0, 1000), st.floats(-2, 2))
def test_a_constant_lead_is_found_whatever_the_items_are(seed: int, lead: float) -> None:
    base = scores(-1, seed=seed)

    (found,) = compare(base + lead, {"no anchor": base}, HOW)

    assert found.estimate == pytest.approx(lead)
    assert found.low == pytest.approx(lead)


def test_equal_scores_show_nothing() -> None:
    (found,) = compare(scores(-1), {"no anchor": scores(-1)}, HOW)

    assert (found.estimate, found.p_value) == (0.0, 1.0)


def test_several_random_texts_add_their_own_spread() -> None:
    one = scores(-1)
    spread = np.linspace(-1, 1, 6)[:, None]

    (narrow,) = compare(one, {"random text": np.repeat(one, 6, axis=0) - 0.1}, HOW)
    (wide,) = compare(one, {"random text": np.repeat(one, 6, axis=0) - 0.1 + spread}, HOW)

    assert wide.estimate == pytest.approx(narrow.estimate)
    assert wide.high - wide.low > narrow.high - narrow.low + 0.5


def test_trainings_of_equal_seeds_are_paired() -> None:
    base = scores(-1, num_rows=3) + np.array([[0.0], [3.0], [-3.0]])

    (found,) = compare(base + 0.2, {"given": base}, HOW)

    assert found.p_value < 0.05


p_values = st.lists(st.floats(0, 1), max_size=6)


@given(p_values, p_values, p_values, st.integers(2, 9))
def test_more_tries_never_make_a_corrected_p_smaller(mine, others, more, tries) -> None:
    tested = [difference("no anchor", 0.1, p) for p in mine]
    families = (([], 1), (others, tries), (others + more, tries + 1))

    alone, few, many = (across_tries(tested, *family) for family in families)

    for first, second, third in zip(alone, few, many, strict=True):
        assert first.p_holm <= second.p_holm <= third.p_holm


def test_the_correction_of_one_try_is_that_of_its_own_comparisons() -> None:
    base = scores(-1)
    tested = compare(base + 0.02, {"no anchor": base, "given": scores(-1.02, seed=1)}, HOW)

    assert across_tries(tested, [], 1) == tested


def test_searching_until_a_text_is_adopted_seldom_adopts_one_that_is_worth_nothing() -> None:
    """Ten tries at most; the candidate is better than all controls but one."""
    generator = np.random.default_rng(0)
    num_adopted, num_searchers = 0, 1500

    for _ in range(num_searchers):
        others: list[float] = []
        for tries in range(1, 11):
            p_values = [1e-4, 1e-4, float(generator.random())]
            tested = [difference("no anchor", 0.1, p) for p in p_values]
            verdict, _ = judge_search(across_tries(tested, others, tries), 0.95)
            if verdict == "adopt":
                num_adopted += 1
                break
            others += p_values

    assert num_adopted / num_searchers < 0.1  # 0.40 if every try counted alone


def test_comparisons_made_together_are_corrected_together() -> None:
    base = scores(-1)
    others = {"a": scores(-1.1, seed=1), "b": scores(-1.15, seed=2), "c": scores(-1.2, seed=3)}

    found = compare(base, others, HOW)

    assert all(one.p_holm >= one.p_value for one in found)
    assert max(one.p_holm / one.p_value for one in found) >= 2


@pytest.mark.parametrize(
    ("tested", "verdict"),
    [
        ([], "no candidate"),
        ([difference("no anchor", 1, 0.01), difference("random text", 1, 0.01)], "adopt"),
        ([difference("no anchor", 1, 0.01), difference("random text", 1, 0.2)], "undetermined"),
        ([difference("no anchor", 1, 0.01), difference("given", -1, 0.01)], "keep"),
        ([difference("no anchor", 1, 0.2), difference("given", -1, 0.01)], "keep"),
    ],
)
def test_only_what_beats_everything_is_adopted(tested: list[Difference], verdict: str) -> None:
    assert judge_search(tested, 0.95)[0] == verdict


@pytest.mark.parametrize(
    ("num_seeds", "verdict"), [(1, "undetermined"), (2, "adopt"), (3, "adopt")]
)
def test_one_training_of_each_anchor_decides_nothing(num_seeds: int, verdict: str) -> None:
    tested = [difference("no anchor", 1, 0.001), difference("random text", 1, 0.001)]

    found, reason = judge_training(tested, 0.95, num_seeds)

    assert found == verdict
    assert ("one seed" in reason) == (num_seeds == 1)


def adopted_from_noise(seed: int) -> bool:
    """Whether the best of 20 equally good texts by one half passes on the other."""
    generator = np.random.default_rng(seed)
    items = generator.normal(-1, 0.5, 32)
    texts = items + generator.normal(0, 0.3, (20, 32))
    none, random = items + generator.normal(0, 0.3, 32), items + generator.normal(0, 0.3, (8, 32))
    choosing, testing = np.arange(16), np.arange(16, 32)
    best = texts[texts[:, choosing].mean(axis=1).argmax()]
    others = {"no anchor": none[None][:, testing], "random text": random[:, testing]}
    return judge_search(compare(best[None][:, testing], others, HOW), 0.95)[0] == "adopt"


def test_the_best_of_many_equal_texts_is_seldom_adopted() -> None:
    adopted = [adopted_from_noise(seed) for seed in range(150)]

    assert np.mean(adopted) <= 0.05
