"""The record of searches: what was compared once stays in the family."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.anchor_tries import TRIES_FILE, family_of
from tell_core.errors import StoreError

ITEMS = ("a", "b")
p_lists = st.lists(st.floats(0.001, 1), max_size=4)


@given(st.lists(st.tuples(st.sampled_from("xyz"), p_lists), min_size=1, max_size=8))
def test_every_comparison_is_counted_once_whenever_it_was_made(tries) -> None:
    with TemporaryDirectory() as root:
        for search, p_values in tries:
            family = family_of(Path(root), search, ITEMS, {"base model": p_values})

    distinct = {(search, tuple(p_values)) for search, p_values in tries}
    others = distinct - {(tries[-1][0], tuple(tries[-1][1]))}
    assert family.num_tries == len({search for search, _ in tries})
    assert sorted(family.others) == sorted(p for _, p_values in others for p in p_values)


def test_searches_on_other_dev_items_are_not_counted(tmp_path: Path) -> None:
    family_of(tmp_path, "x", ITEMS, {"base model": [0.2]})

    assert family_of(tmp_path, "y", ("a", "c"), {"base model": [0.1]}) == (1, [])
    assert family_of(tmp_path, "z", ("b", "a"), {"base model": [0.1]}) == (2, [0.2])


def test_what_training_said_is_kept_when_a_search_is_looked_at_without_it(tmp_path: Path) -> None:
    both = {"base model": [0.2], "after training": [0.4, 0.5]}
    family_of(tmp_path, "x", ITEMS, both)

    assert family_of(tmp_path, "x", ITEMS, {"base model": [0.2]}) == (1, [0.4, 0.5])


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"search": "x"}]'])
def test_a_damaged_record_is_no_fresh_start(tmp_path: Path, text: str) -> None:
    (tmp_path / TRIES_FILE).write_text(text)

    with pytest.raises(StoreError, match=TRIES_FILE):
        family_of(tmp_path, "x", ITEMS, {"base model": [0.2]})
