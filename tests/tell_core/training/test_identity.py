from collections.abc import Callable
from typing import Any

import pytest

from tell_core.spec.model import TrainingSpec
from tell_core.training.identity import NOT_IDENTITY, training_fields

PIECES = {
    "batching": "padded",
    "micro_batch_size": 2,
    "micro_batch_tokens": 99,
    "num_ranks": 2,
}
ELSEWHERE = PIECES | {
    "device": "cuda",
    "threads": 2,
    "checkpoint_seconds": 5.0,
    "gradient_checkpointing": True,
}


def test_where_and_in_what_pieces_a_training_runs_is_no_part_of_it(
    training_spec: Callable[..., TrainingSpec],
):
    assert set(ELSEWHERE) == NOT_IDENTITY
    assert training_fields(training_spec(**ELSEWHERE)) == training_fields(training_spec())


def test_everything_else_is():
    fields = training_fields(TrainingSpec(keep_probe_weights=True, probe_share=0.1))
    left_out = set(TrainingSpec.model_fields) - set(fields)

    assert left_out == NOT_IDENTITY


def test_a_training_that_keeps_no_weights_at_its_probes_is_what_it_always_was():
    assert "keep_probe_weights" not in training_fields(TrainingSpec())


def test_a_training_without_a_limit_on_its_probes_is_what_it_always_was():
    assert "probe_share" not in training_fields(TrainingSpec())


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    ("settings", "matters"),
    [
        ({"lora_dropout": 0.1}, True),
        ({"lora_dropout": 0.0}, False),
        ({"lora_dropout": 0.1, "method": "full"}, False),
    ],
)
def test_the_pieces_of_a_step_matter_only_with_adapter_dropout(
    training_spec: Callable[..., TrainingSpec],
    piece: str,
    settings: dict[str, Any],
    matters: bool,
):
    usual = training_fields(training_spec(**settings))
    changed = training_fields(training_spec(**settings, **{piece: PIECES[piece]}))

    assert (usual != changed) == matters
