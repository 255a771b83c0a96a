import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tell_core.errors import SpecError, TrainingError
from tell_core.spec.model import TrainingSpec
from tell_core.training import ranks
from tell_core.training.loop import train_cell


@pytest.fixture
def train(
    model_directory: Path, write_inputs: Callable[..., Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    inputs = write_inputs(epochs=4)

    def run(training: TrainingSpec, name: str, **more: Any) -> dict[str, Any]:
        return train_cell(
            model_path=str(model_directory), revision=None, inputs=inputs, training=training,
            seed=3, out=tmp_path / name, **more,
        )  # fmt: skip

    return run


def curves(out: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [[line["loss"], line["task_loss"] or 0.0, line["grad_norm"]] for line in lines]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_ranks_equal_one_process_over_twenty_steps(
    train: Callable[..., dict[str, Any]],
    training_spec: Callable[..., TrainingSpec],
    tmp_path: Path,
    method: str,
):
    """96 examples in batches of 5: the last of 20 steps has one example for two ranks."""
    settings = {"method": method, "batch_size": 5, "learning_rate": 1e-3}
    train(training_spec(**settings), "one")

    summary = train(training_spec(**settings, num_ranks=2), "two")

    assert summary["steps"] == 20
    assert summary["num_ranks"] == 2
    torch.testing.assert_close(
        torch.tensor(curves(tmp_path / "two")), torch.tensor(curves(tmp_path / "one")),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    (one,), (two,) = ((tmp_path / name).glob("*/*.safetensors") for name in ("one", "two"))
    expected = load_file(one)
    for name, weight in load_file(two).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_a_rank_that_ends_stops_the_training_with_its_words(
    train: Callable[..., dict[str, Any]],
    training_spec: Callable[..., TrainingSpec],
    monkeypatch: pytest.MonkeyPatch,
):
    original = ranks.helper_arguments

    def elsewhere(**arguments: Any) -> dict[str, Any]:
        return original(**arguments) | {"model_path": "/nowhere/at/all"}

    monkeypatch.setattr("tell_core.training.loop.helper_arguments", elsewhere)

    with pytest.raises(TrainingError, match=r"(?s)rank 1 .*/nowhere/at/all"):
        train(training_spec(num_ranks=2), "broken")


def test_more_ranks_than_examples_of_a_step_are_refused(
    train: Callable[..., dict[str, Any]], training_spec: Callable[..., TrainingSpec]
):
    with pytest.raises(SpecError, match="only 4 examples"):
        train(training_spec(num_ranks=5), "refused")
