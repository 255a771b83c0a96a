"""P7 on gradients whose directions are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.analysis.directions import (
    FLOOR_NATS,
    exchanged_groups,
    group_cosines,
    judge_movements,
)
from tell_core.analysis.kept_weights import Groups
from tell_core.analysis.quanta.movement import Movement
from tell_core.analysis.resampling import Resampling
from tell_core.analysis.verdicts import judge

NUM_ITEMS, PER_ITEM, NUM_DIMENSIONS, NUM_INTERVALS = 12, 4, 64, 6
HOW = Resampling(num_draws=200)
PULL = {"shared": (0.5, 0.0), "specific": (0.0, 0.5), "both": (0.4, 0.4), "neither": (0.0, 0.0)}


def groups(seed: int = 0, items: np.ndarray | None = None) -> Groups:
    """Units of both groups within every item."""
    items = np.repeat(np.arange(NUM_ITEMS), PER_ITEM) if items is None else items
    is_shared = np.random.default_rng(seed).permutation(np.arange(len(items)) % 2 == 0)
    return Groups(np.arange(len(items)), is_shared, items)


def movement(units: Groups, towards: str, seed: int, losses: float = 1.0) -> Movement:
    """A training that goes down the losses of these groups, among much that is of one unit alone.

    Either group's gradients share one axis.
    """
    generator = np.random.default_rng(seed)
    axes = np.eye(NUM_DIMENSIONS)[:2]
    pull = np.array(PULL[towards])
    along, gram = [], []
    for _ in range(NUM_INTERVALS):
        common = np.where(units.is_shared[:, None], axes[0], axes[1])
        vectors = common + 0.3 * generator.normal(size=(len(units.items), NUM_DIMENSIONS))
        change = -pull @ axes + generator.normal(0, 0.08, NUM_DIMENSIONS)
        along.append(-vectors @ change / np.linalg.norm(change))
        gram.append(vectors @ vectors.T)
    return Movement(
        np.arange(NUM_INTERVALS + 1),
        np.array(along),
        np.array(gram),
        np.full((NUM_INTERVALS, len(units.items)), losses),
    )


def verdict(tell: str, sft: str, num_seeds: int = 3) -> dict:
    units = groups()
    movements = {
        "tell": [movement(units, tell, seed) for seed in range(num_seeds)],
        "sft": [movement(units, sft, 100 + seed) for seed in range(num_seeds)],
    }
    (row,) = judge([judge_movements(movements, units, HOW)], 0.95)
    return row


def test_tell_along_specific_and_sft_along_both_is_support() -> None:
    row = verdict("specific", "both")

    assert row["verdict"] == "supported"
    assert row["estimate"] == pytest.approx(0.53, abs=0.1)
    assert [part["is_as_predicted"] for part in row["components"]] == [True, True, True]


def test_tell_along_shared_directions_contradicts() -> None:
    assert verdict("shared", "both")["verdict"] == "contradicted"


@pytest.mark.parametrize(("tell", "sft"), [("both", "both"), ("specific", "specific")])
def test_arms_that_move_alike_determine_nothing(tell: str, sft: str) -> None:
    assert verdict(tell, sft)["verdict"] == "undetermined"


def test_a_group_that_nothing_moves_under_sft_is_no_support() -> None:
    assert verdict("specific", "neither")["verdict"] != "supported"


def test_the_cosine_is_one_straight_down_a_groups_loss() -> None:
    units = groups()
    vectors = np.random.default_rng(0).normal(size=(len(units.items), 8))
    down = -vectors[units.is_shared].mean(axis=0)
    found = Movement(
        np.array([0, 1]),
        -(vectors @ (down / np.linalg.norm(down)))[None],
        (vectors @ vectors.T)[None],
        np.ones((1, len(units.items))),
    )

    assert group_cosines(found, units.is_shared[None].astype(float)) == pytest.approx(1.0)


@given(st.floats(0.1, 10), st.integers(0, 50))
def test_cosines_depend_on_the_ratios_of_weights_alone(scale: float, seed: int) -> None:
    units = groups()
    weights = np.random.default_rng(seed).random((1, len(units.items)))
    found = movement(units, "both", seed)

    assert group_cosines(found, scale * weights) == pytest.approx(group_cosines(found, weights))


def test_an_empty_group_has_no_cosine() -> None:
    units = groups()

    assert np.isnan(
        group_cosines(movement(units, "both", 0), np.zeros((1, len(units.items))))
    ).all()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 99),
)
def test_exchanged_groups_keep_the_numbers_within_mixed_items_and_whole_items_whole(
    units: list[tuple[int, bool]], seed: int
) -> None:
    items = np.array([item for item, _ in units])
    is_shared = np.array([shared for _, shared in units])

    exchanged = exchanged_groups(is_shared, items, 20, seed)

    pure = {item for item in set(items.tolist()) if len(set(is_shared[items == item])) == 1}
    for row in exchanged:
        called = {item: row[items == item] for item in set(items.tolist())}
        for item, now in called.items():
            if item in pure:
                assert len(set(now.tolist())) == 1
            else:
                assert now.sum() == is_shared[items == item].sum()
        assert sum(called[item][0] for item in pure) == sum(
            is_shared[items == item][0] for item in pure
        )


def test_every_unit_can_change_its_group() -> None:
    units = groups()

    exchanged = exchanged_groups(units.is_shared, units.items, 200, 0)

    is_mixed = np.array(
        [0 < units.is_shared[units.items == i].sum() < PER_ITEM for i in units.items]
    )
    assert exchanged.any(axis=0)[is_mixed].all()
    assert not exchanged.all(axis=0)[is_mixed].any()


def null_p_values(seed: int) -> list[float]:
    """P-values of the two comparisons of groups where all units are of one kind."""
    items = np.repeat(np.arange(NUM_ITEMS), PER_ITEM)
    alike = Groups(np.arange(len(items)), np.zeros(len(items), dtype=bool), items)
    movements = {
        arm: [movement(alike, "specific", 1000 * seed + 10 * place + k) for k in range(3)]
        for place, arm in enumerate(("tell", "sft"))
    }
    found = judge_movements(movements, groups(seed), Resampling(num_draws=200))
    return [part.p_value for part in found.components[:2]]


@pytest.mark.slow
def test_exchangeable_groups_are_told_apart_no_oftener_than_the_level_says() -> None:
    p_values = np.array([null_p_values(seed) for seed in range(200)])

    assert (p_values <= 0.05).mean() <= 0.07
    assert np.median(p_values) > 0.3


def test_probes_at_which_a_group_is_known_do_not_count() -> None:
    units = groups()
    ones = [movement(units, "specific", seed, losses=FLOOR_NATS / 2) for seed in range(3)]

    found = judge_movements({"tell": ones, "sft": ones}, units, HOW)

    assert "both groups were known" in str(found.needs)


def test_trainings_with_other_numbers_of_probes_are_not_compared() -> None:
    units = groups()
    ones = [movement(units, "specific", seed) for seed in range(3)]
    cut = Movement(ones[0].steps[:-1], ones[0].along[1:], ones[0].gram[1:], ones[0].losses[1:])

    found = judge_movements({"tell": [cut, *ones[1:]], "sft": ones}, units, HOW)

    assert "the same number of probes" in str(found.needs)


def test_the_report_gets_a_row_for_every_arm_and_interval() -> None:
    units = groups()
    ones = [movement(units, "both", seed) for seed in range(2)]

    rows = judge_movements({"tell": ones, "sft": ones}, units, HOW).figure["directions"]

    assert len(rows) == 2 * NUM_INTERVALS
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)
