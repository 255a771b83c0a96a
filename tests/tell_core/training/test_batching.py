from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tell_core.training.batching import (
    Limits,
    count_batches,
    lay_out,
    needs_no_layout,
    share_rows,
    tighter,
)

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=24).map(np.asarray)
LIMITS = st.builds(
    Limits,
    layout=st.sampled_from(["padded", "length_grouped", "packed"]),
    max_examples=st.one_of(st.none(), st.integers(1, 9)),
    max_tokens=st.one_of(st.none(), st.integers(1, 300)),
)


@given(lengths=LENGTHS, limits=LIMITS)
def test_forward_passes_partition_the_examples_of_a_step(lengths: np.ndarray, limits: Limits):
    passes = lay_out(lengths, limits)

    assert sorted(np.concatenate(passes).tolist()) == list(range(len(lengths)))


@given(lengths=LENGTHS, limits=LIMITS)
def test_a_forward_pass_of_several_examples_keeps_within_the_limits(
    lengths: np.ndarray, limits: Limits
):
    for part in lay_out(lengths, limits):
        assert len(part) <= (limits.max_examples or len(lengths))
        if len(part) > 1:
            assert (
                limits.max_tokens is None or limits.num_tokens(lengths[part]) <= limits.max_tokens
            )


@given(lengths=LENGTHS, limits=LIMITS)
def test_grouped_by_length_no_example_is_padded_to_more_than_twice_its_length(
    lengths: np.ndarray, limits: Limits
):
    grouped = replace(limits, layout="length_grouped")

    for part in lay_out(lengths, grouped):
        assert lengths[part].max() <= 2 * lengths[part].min()


def fewest_packs(lengths: list[int], limit: int, room: tuple[int, ...] = ()) -> int:
    """The fewest packs, by trying all: room is what is left in those begun."""
    if not lengths:
        return len(room)
    first, *others = lengths
    found = fewest_packs(others, limit, (*room, limit - first))
    for left in {left for left in room if left >= first}:
        at = room.index(left)
        filled = (*room[:at], left - first, *room[at + 1 :])
        found = min(found, fewest_packs(others, limit, filled))
    return found


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=7), limit=st.integers(90, 200))
def test_best_fit_needs_at_most_eleven_ninths_of_the_fewest_packs_plus_one(
    lengths: list[int], limit: int
):
    num_packs = len(lay_out(np.asarray(lengths), Limits("packed", None, limit)))

    assert num_packs <= 11 / 9 * fewest_packs(lengths, limit) + 1


def test_best_fit_takes_the_fullest_pack_with_room():
    packs = lay_out(np.array([5, 6, 4, 3]), Limits("packed", None, 10))

    assert [part.tolist() for part in packs] == [[1, 2], [0, 3]]


def test_padded_keeps_the_stored_order():
    passes = lay_out(np.array([3, 9, 2, 5]), Limits("padded", 2, None))

    assert [part.tolist() for part in passes] == [[0, 1], [2, 3]]


@given(
    data=st.data(),
    lengths=LENGTHS,
    limits=LIMITS,
    batch_size=st.integers(1, 10),
    num_ranks=st.integers(1, 3),
)
def test_counts_before_training_equal_those_of_every_step_and_rank(
    data: st.DataObject, lengths: np.ndarray, limits: Limits, batch_size: int, num_ranks: int
):
    rows = st.integers(0, len(lengths) - 1)
    order = np.asarray(data.draw(st.lists(rows, min_size=1, max_size=40)))

    counts = count_batches(lengths, order, batch_size, limits, num_ranks)

    steps = [lengths[order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    shares = [step[share] for step in steps for share in share_rows(step, num_ranks)]
    passes = [share[part] for share in shares if len(share) for part in lay_out(share, limits)]
    assert counts.steps == len(steps)
    assert counts.forward_passes == len(passes)
    assert counts.tokens == sum(part.sum() for part in passes)
    assert counts.padded_tokens == sum(limits.num_tokens(part) for part in passes)
    if limits.layout == "packed":
        assert counts.padding_share == 0


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(
    data=st.data(),
    lengths=LENGTHS,
    limits=LIMITS,
    batch_size=st.integers(1, 10),
    num_ranks=st.integers(1, 2),
)
def test_where_no_layout_is_needed_every_order_gives_a_pack_per_step(
    data: st.DataObject, lengths: np.ndarray, limits: Limits, batch_size: int, num_ranks: int
):
    assume(needs_no_layout(lengths, batch_size, limits, num_ranks))
    rows = st.integers(0, len(lengths) - 1)
    order = np.asarray(data.draw(st.lists(rows, min_size=1, max_size=40)))

    counts = count_batches(lengths, order, batch_size, limits, num_ranks)

    assert counts.forward_passes == counts.steps
    assert counts.padded_tokens == counts.tokens


@given(lengths=LENGTHS, limits=LIMITS)
def test_tighter_limits_end_at_one_example_at_a_time(lengths: np.ndarray, limits: Limits):
    sizes = []
    while limits is not None:
        sizes.append(max(limits.num_tokens(lengths[part]) for part in lay_out(lengths, limits)))
        last, limits = limits, tighter(limits, lengths)

    assert sizes == sorted(sizes, reverse=True)
    assert all(len(part) == 1 for part in lay_out(lengths, last))


@given(lengths=LENGTHS, num_ranks=st.integers(1, 6))
def test_ranks_share_the_examples_and_differ_by_one_example_at_most(
    lengths: np.ndarray, num_ranks: int
):
    shares = share_rows(lengths, num_ranks)

    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    tokens = [int(lengths[share].sum()) for share in shares]
    assert max(tokens) - min(tokens) <= lengths.max()


@pytest.mark.parametrize(
    ("layout", "passes"), [("padded", 1), ("length_grouped", 2), ("packed", 1)]
)
def test_without_limits_only_short_examples_keep_a_step_from_being_one_forward_pass(
    layout: str, passes: int
):
    lengths = np.array([10, 20, 9, 12, 19])

    assert len(lay_out(lengths, Limits(layout))) == passes  # type: ignore[arg-type]
