from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tell_core.errors import ModelError
from tell_core.spec.model import TrainingSpec
from tell_core.training import models
from tell_core.training.models import LoadedModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_id", ["./no/such/model", "/no/such/model"])
def test_a_missing_directory_is_named_with_the_mend(model_id: str):
    with pytest.raises(ModelError, match=r"no/such/model.*tell fetch-model") as caught:
        models.resolve_model(model_id)

    assert caught.value.exit_code == 2


def test_an_unknown_hub_id_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelError, match=r"tried the directory .* and the Hugging Face id"):
        models.resolve_model("nobody/no-such-model")


def test_a_model_is_loaded_with_its_tokenizer_and_digest(model_directory: Path, base: LoadedModel):
    loaded = models.load_model(str(model_directory), device=CPU)

    pairs = zip(loaded.model.parameters(), base.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(loaded.tokenizer) == len(base.tokenizer)
    assert loaded.digest == models.model_digest(model_directory)


def test_pickled_weights_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        models.load_model(str(tmp_path), device=CPU)


def test_a_changed_weight_changes_the_digest(model_directory: Path, tmp_path: Path):
    for path in model_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert models.model_digest(tmp_path) != models.model_digest(model_directory)


def test_equal_seeds_give_equal_random_models(base: LoadedModel):
    def create(seed: int) -> LoadedModel:
        return models.create_model_from_config(
            base.tokenizer,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=64,
            max_tokens=64,
            seed=seed,
        )

    again, other = create(0), create(1)

    assert torch.equal(again.model.lm_head.weight, base.model.lm_head.weight)
    assert again.digest == base.digest
    assert other.digest != base.digest


def test_a_saved_adapter_gives_the_same_logits_and_comes_off_again(
    training_spec: Callable[..., TrainingSpec], base: LoadedModel, tmp_path: Path
):
    ids = torch.arange(2, 12)[None]
    before = base.model(ids).logits
    adapted = models.attach_lora(base.model, training_spec())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = adapted(ids).logits
    models.save_trained(adapted, base.tokenizer, tmp_path)
    models.detach_adapter(adapted)
    torch.testing.assert_close(base.model(ids).logits, before, rtol=0, atol=0)

    loaded = models.load_trained(base, tmp_path)

    torch.testing.assert_close(loaded(ids).logits, trained, rtol=0, atol=0)
    assert not torch.allclose(trained, before)
    models.detach_adapter(loaded)
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_adapter_files_are_equal_for_equal_adapters(
    training_spec: Callable[..., TrainingSpec], base: LoadedModel, tmp_path: Path
):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        adapted = models.attach_lora(base.model, training_spec())
        assert isinstance(adapted, PeftModel)
        models.save_trained(adapted, base.tokenizer, tmp_path / name)
        models.detach_adapter(adapted)

    files = [sorted((tmp_path / name / "adapter").iterdir()) for name in ("one", "two")]

    assert [path.name for path in files[0]] == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_lora_targets_that_do_not_exist_are_answered_with_those_that_do(
    training_spec: Callable[..., TrainingSpec], base: LoadedModel
):
    with pytest.raises(ModelError, match=r"q_projection.*down_proj.*q_proj"):
        models.attach_lora(base.model, training_spec(lora_targets=("q_projection",)))


def test_a_directory_without_trained_weights_is_refused(base: LoadedModel, tmp_path: Path):
    with pytest.raises(ModelError, match="neither adapter/ nor model/"):
        models.load_trained(base, tmp_path)
