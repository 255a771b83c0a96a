"""Items and the prompts made of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.data.encoding import from_lists
from tell_core.errors import InputError
from tell_core.evaluation.items import ItemSet, token_limit
from tell_core.spec.model import EvaluationSpec


def items(*item_ids: str) -> ItemSet:
    rows = [{"item_id": name, "reference": "x", "extra": {"limit": 3}} for name in item_ids]
    return ItemSet(rows, from_lists([([1, 2, 3], 2)] * len(rows), is_task=True))


@given(
    order=st.permutations(["a", "b", "c", "d"]),
    seed=st.integers(0, 99),
    repeat=st.integers(0, 3),
)
def test_random_stream_of_an_item_depends_on_nothing_but_itself(
    order: list[str], seed: int, repeat: int
) -> None:
    evaluation = EvaluationSpec(decoding_seed=seed)

    requests = items(*order).requests(evaluation, repeat)

    for name, request in zip(order, requests, strict=True):
        assert request.seed == items(name).requests(evaluation, repeat)[0].seed
    assert len({request.seed for request in requests}) == len(order)


def test_random_streams_differ_between_repeats_and_seeds() -> None:
    found = {
        items("a").requests(EvaluationSpec(decoding_seed=seed), repeat)[0].seed
        for seed in range(3)
        for repeat in range(3)
    }

    assert len(found) == 9
    assert all(0 <= seed < 2**63 for seed in found)


def test_prompt_is_what_stands_before_the_response() -> None:
    (request,) = items("a").requests(EvaluationSpec(max_new_tokens=7), 0)

    assert request.prompt.tolist() == [1, 2]
    assert request.max_new_tokens == 7


@given(st.integers(1, 50) | st.integers(1, 50).map(float), st.integers(1, 40))
def test_own_limit_is_capped_by_the_specifications(value: float, cap: int) -> None:
    evaluation = EvaluationSpec(max_new_tokens=cap, max_new_tokens_column="limit")

    limit = token_limit({"item_id": "a", "extra": {"limit": value}}, evaluation)

    assert limit == min(int(value), cap)


@pytest.mark.parametrize("value", [None, 0, -1, 2.5, float("inf"), "12", True, [1]])
def test_wrong_limit_names_the_item(value: Any) -> None:
    evaluation = EvaluationSpec(max_new_tokens_column="limit")

    with pytest.raises(InputError, match=r"test item test-3: column 'limit' .* whole number"):
        token_limit({"item_id": "test-3", "extra": {"limit": value}}, evaluation)
