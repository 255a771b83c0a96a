from collections.abc import Callable
from typing import Any

import pytest

from tell_core.spec.model import TrainingSpec
from tell_core.training.identity import NOT_IDENTITY, training_fields

ELSEWHERE = {"device": "cuda", "threads": 2, "checkpoint_seconds": 5.0, "micro_batch_size": 2}


def test_where_and_in_what_pieces_a_training_runs_is_no_part_of_it(
    training_spec: Callable[..., TrainingSpec],
):
    assert set(ELSEWHERE) == NOT_IDENTITY
    assert training_fields(training_spec(**ELSEWHERE)) == training_fields(training_spec())


def test_everything_else_is():
    left_out = set(TrainingSpec.model_fields) - set(training_fields(TrainingSpec()))

    assert left_out == NOT_IDENTITY


@pytest.mark.parametrize(
    ("settings", "matters"),
    [
        ({"lora_dropout": 0.1}, True),
        ({"lora_dropout": 0.0}, False),
        ({"lora_dropout": 0.1, "method": "full"}, False),
    ],
)
def test_the_micro_batch_size_matters_only_with_adapter_dropout(
    training_spec: Callable[..., TrainingSpec], settings: dict[str, Any], matters: bool
):
    one, two = (
        training_fields(training_spec(micro_batch_size=size, **settings)) for size in (1, 2)
    )

    assert (one != two) == matters
