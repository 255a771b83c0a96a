from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tell_core import doctor
from tell_core.doctor import check_environment, check_experiment, worst
from tell_core.spec.model import ExperimentSpec
from tell_core.store import read_json
from tests.fixtures.tiny import tiny_fields


@pytest.fixture
def spec(tiny_world: Path) -> ExperimentSpec:
    return ExperimentSpec.model_validate(tiny_fields(tiny_world))


def with_method(spec: ExperimentSpec, method: str) -> ExperimentSpec:
    training = spec.training.model_copy(update={"method": method})
    return spec.model_copy(update={"training": training})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sound_experiment_passes_every_check(spec: ExperimentSpec, tmp_path: Path, method: str):
    checks, samples = check_experiment(with_method(spec, method), tmp_path)

    assert [check.verdict for check in checks] == ["ok"] * 8, checks
    assert len(samples) == 2
    assert all(any(supervised for _, supervised in pieces) for pieces in samples)


def test_a_model_that_mixes_the_examples_of_a_batch_fails(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch
):
    def leak(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0] + 0.1 * inputs[0].mean(dim=0, keepdim=True),)

    def load(*arguments, **options):
        loaded = original(*arguments, **options)
        loaded.model.model.layers[0].mlp.register_forward_pre_hook(leak)
        return loaded

    original = doctor.load_model
    monkeypatch.setattr(doctor, "load_model", load)

    checks, _ = check_experiment(spec, tmp_path)

    failed = {check.name for check in checks if check.verdict == "fail"}
    assert "batch equals single examples (loss)" in failed
    assert "one batch equals micro-batches (gradient)" in failed


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_data_of_another_tokenizer_or_template_are_found(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch, what: str
):
    def changed(path: Path):
        return read_json(path) | {f"{what}_digest": "0" * 64}

    monkeypatch.setattr(doctor, "read_json", changed)

    checks, _ = check_experiment(spec, tmp_path)

    (found,) = (check for check in checks if check.verdict == "fail")
    assert f"the model's {what} is" in found.detail


def test_a_token_that_the_model_does_not_embed_is_found(
    spec: ExperimentSpec, tmp_path: Path, monkeypatch
):
    def load(*arguments, **options):
        loaded = original(*arguments, **options)
        monkeypatch.setattr(loaded.model, "get_input_embeddings", lambda: nn.Embedding(2, 2))
        return loaded

    original = doctor.load_model
    monkeypatch.setattr(doctor, "load_model", load)

    checks, _ = check_experiment(spec, tmp_path)

    assert any("the model embeds 2" in check.detail for check in checks)


def test_supervised_prompt_tokens_are_found(spec: ExperimentSpec, tmp_path: Path, monkeypatch):
    original = doctor.open_mixture

    def shifted(path: Path):
        mixture = original(path)
        starts = np.maximum(mixture.examples.response_starts - 2, 1)
        object.__setattr__(mixture.examples, "response_starts", starts)
        return mixture

    monkeypatch.setattr(doctor, "open_mixture", shifted)

    checks, _ = check_experiment(spec, tmp_path)

    assert {check.name: check.verdict for check in checks}["texts"] == "fail"


def test_the_environment_names_a_package_of_a_wrong_version(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["torch<1", "nonesuch>2"])

    checks = check_environment(tmp_path / "not" / "there")

    packages = checks[0]
    assert packages.verdict == worst(checks) == "fail"
    assert "nonesuch is missing" in packages.detail
    assert "needed <1" in packages.detail
