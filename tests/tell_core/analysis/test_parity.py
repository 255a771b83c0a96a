import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tell_core.analysis import controls
from tell_core.analysis.parity import (
    LOG_2,
    ParitySetting,
    draw_subsets,
    read_parity,
    train_parity,
)
from tell_core.errors import AnalysisError, InputError

CONFIG = Path(__file__).parents[3] / "configs" / "parity.yaml"

SMALL = ParitySetting(
    num_subtasks=6, num_bits=6, width=64, batch_size=200, num_steps=1200, learning_rate=5e-3
)


@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_subtasks_have_different_subsets_of_distinct_bits(
    num_bits: int, subset_size: int, seed: int
) -> None:
    subset_size = min(subset_size, num_bits)
    setting = ParitySetting(
        num_subtasks=math.comb(num_bits, subset_size), num_bits=num_bits, subset_size=subset_size
    )

    subsets = draw_subsets(setting, seed)

    assert len({tuple(row) for row in subsets.tolist()}) == setting.num_subtasks
    assert all(len(set(row)) == subset_size for row in subsets.tolist())


def test_fewer_subsets_than_subtasks_are_refused() -> None:
    with pytest.raises(AnalysisError, match="use more bits"):
        ParitySetting(num_subtasks=100, num_bits=8)


def test_subtasks_start_at_chance_and_are_learned() -> None:
    run = train_parity(SMALL, 0)

    assert run.losses[0] == pytest.approx(np.full(6, LOG_2), abs=0.1)
    assert run.losses[-1, 0] < 0.1
    assert run.mean_loss[-1] == pytest.approx(run.losses[-1] @ run.frequencies)


def test_a_seed_gives_the_same_training_and_leaves_the_random_state_alone() -> None:
    short = replace(SMALL, num_steps=20)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)

    first, second = train_parity(short, 3), train_parity(short, 3)

    assert np.array_equal(first.losses, second.losses)
    assert torch.equal(torch.rand(1), expected)


def test_the_problem_of_the_file_is_that_of_the_control() -> None:
    setting, seeds = read_parity(CONFIG)

    assert (setting, seeds) == (controls.PARITY, controls.PARITY_SEEDS)


@pytest.mark.parametrize(
    ("text", "word"),
    [("num_subtask: 5", "num_subtasks"), ("width: wide", "width"), ("- 1", "no sparse parity")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "parity.yaml").write_text(text)

    with pytest.raises(InputError, match=word):
        read_parity(tmp_path / "parity.yaml")


@pytest.mark.slow
def test_the_parity_control_is_accepted() -> None:
    checks = controls.parity()

    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 4 * len(controls.PARITY_SEEDS)
