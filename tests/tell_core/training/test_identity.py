from collections.abc import Callable
from typing import Any

import pytest

from tell_core.spec.model import TrainingSpec
from tell_core.training.identity import (
    AUTO_TOKENS,
    NOT_IDENTITY,
    tokens_per_pass,
    training_fields,
)

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


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_the_usual_size_of_a_forward_pass_is_one_number_in_the_identity(
    training_spec: Callable[..., TrainingSpec], lora_dropout: float
):
    """Fingerprints are those from before there was ``auto``, on every machine."""
    usual = training_spec(lora_dropout=lora_dropout)
    given = training_spec(lora_dropout=lora_dropout, micro_batch_tokens=AUTO_TOKENS)

    assert usual.micro_batch_tokens == "auto"
    assert training_fields(usual) == training_fields(given)


def test_the_usual_size_of_a_forward_pass_is_smaller_on_a_cpu_where_it_changes_rounding_only(
    training_spec: Callable[..., TrainingSpec],
):
    def sizes(**settings: Any) -> list[int | None]:
        spec = training_spec(**settings)
        return [tokens_per_pass(spec, is_cpu=is_cpu) for is_cpu in (True, False)]

    assert sizes() == [1024, 4096]
    assert sizes(method="full") == [1024, 4096]
    assert sizes(lora_dropout=0.1) == [4096, 4096]
    assert sizes(micro_batch_tokens=None) == [None, None]
    assert sizes(micro_batch_tokens=77) == [77, 77]


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
