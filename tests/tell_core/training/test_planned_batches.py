"""What is planned before a model is loaded is what its training computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tell_core.errors import ModelError
from tell_core.pipeline import curate_stage, mix_stage, settled, train_stage
from tell_core.plan import make_plan, plan_rows
from tell_core.results import _batches
from tell_core.spec.model import ExperimentSpec, TrainingSpec
from tell_core.store import read_json
from tell_core.training.attention import planned_limits
from tell_core.training.models import skeleton
from tests.fixtures.tiny import tiny_fields
from tests.tell_core.training.conftest import _training_spec
from tests.tell_core.training.families import CONFIGS, REFUSED, write_family

STRUCTURAL = ("gemma2", "bloom", "falcon")  # refused for their code; others for their numbers


@pytest.fixture
def fields(tiny_world: Path) -> dict[str, Any]:
    """Three cells of one seed, one learning rate, one epoch."""
    fields = tiny_fields(tiny_world) | {"arms": ["base", "sft", "tell"], "seeds": [0]}
    fields["budgets"] = {"task_tokens": [200], "general_tokens": 400}
    fields["training"] |= {"learning_rate": 0.001}
    return fields


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_tokens": 60},
        {"micro_batch_size": 3},
        {"batching": "length_grouped", "micro_batch_tokens": 90},
        {"batching": "padded", "micro_batch_tokens": 90},
        pytest.param({"micro_batch_tokens": 60, "num_ranks": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ", ".join(f"{name} {value}" for name, value in changes.items()) or "auto",
)
def test_planned_forward_passes_and_padding_are_those_of_the_training(
    fields: dict[str, Any], changes: dict[str, Any], tmp_path: Path
):
    fields["training"] |= changes
    spec = ExperimentSpec.model_validate(fields)
    curated = curate_stage(spec, tmp_path)

    plan = make_plan(spec, curated)

    planned = {entry.cell.name: entry.batches for entry in plan.cells}
    done = {}
    for entry in plan.cells:
        if entry.num_trainings:
            one = settled(spec, spec.training.candidates[0])
            trained = train_stage(one, entry.cell, mix_stage(one, entry.cell, curated))
            done[entry.cell.name] = read_json(trained.path / "summary.json")
            recorded = _batches(trained)
            assert recorded is not None
            assert recorded.items() <= done[entry.cell.name].items()
    assert len(done) == 2
    assert {name for name, batches in planned.items() if batches} == set(done)
    for name, summary in done.items():
        batches = planned[name]
        assert batches is not None
        assert summary["forward_passes"] == batches.forward_passes
        assert summary["steps"] == batches.steps
        assert summary["padding_share"] == pytest.approx(batches.padding_share)
    passes = [row["forward passes"] for row in plan_rows(plan)]
    assert passes == [batches.forward_passes if batches else 0 for batches in planned.values()]


@pytest.mark.parametrize("family", [*CONFIGS, *STRUCTURAL])
def test_the_layout_is_known_from_the_code_of_a_model(family: str, tokenizer: Any, tmp_path: Path):
    config = CONFIGS[family] if family in CONFIGS else REFUSED[family][0]
    model = skeleton(str(write_family(config, tokenizer, tmp_path / "model")))

    def layout(batching: str) -> str:
        training: TrainingSpec = _training_spec(batching=batching)
        return planned_limits(model, training).layout

    assert all(weight.is_meta for weight in model.parameters())
    assert layout("auto") == ("packed" if family in CONFIGS else "length_grouped")
    assert layout("padded") == "padded"
    if family in STRUCTURAL:
        with pytest.raises(ModelError, match=family):
            layout("packed")


@pytest.mark.parametrize(
    ("device", "has_gpu", "tokens"),
    [
        ("auto", False, 1024),
        ("auto", True, 4096),
        ("cpu", True, 1024),
        ("cuda", True, 4096),
        ("cuda", False, 4096),  # planned here, run elsewhere
    ],
)
def test_forward_passes_are_planned_for_the_device_that_will_compute_them(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: str, has_gpu: bool, tokens: int,
):  # fmt: skip
    model = skeleton(str(write_family(CONFIGS["llama"], tokenizer, tmp_path / "model")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    assert planned_limits(model, _training_spec(device=device)).max_tokens == tokens
