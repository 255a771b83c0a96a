import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


def test_a_shared_model_stays_in_memory_until_its_files_change(model_copy: Path):
    def share() -> LoadedModel:
        return models.shared_model(str(model_copy), revision=None, dtype="auto", device=CPU)

    first = share()
    again = share()
    (model_copy / "generation_config.json").write_text('{"eos_token_id": 1}')

    assert again is first
    assert share() is not first


def test_pickled_weights_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")

    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        models.load_model(str(tmp_path), device=CPU)


@pytest.fixture
def model_copy(model_directory: Path, tmp_path: Path) -> Path:
    """A copy of the model's directory, to be damaged."""
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


def test_a_changed_weight_changes_the_digest(model_directory: Path, model_copy: Path):
    weights = model_copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert models.model_digest(model_copy) != models.model_digest(model_directory)


def test_the_digest_covers_the_end_tokens_of_generation(model_copy: Path):
    before = models.model_digest(model_copy)
    (model_copy / "generation_config.json").write_text('{"eos_token_id": 7}')
    other = models.model_digest(model_copy)
    (model_copy / "generation_config.json").unlink()

    assert len({before, other, models.model_digest(model_copy)}) == 3


def test_the_digest_reads_unchanged_files_once(model_copy: Path, monkeypatch: pytest.MonkeyPatch):
    before = models.model_digest(model_copy)
    monkeypatch.setattr(models, "file_digest", lambda path: pytest.fail(f"{path} was read again"))

    assert models.model_digest(model_copy) == before


@given(share=st.floats(0, 0.999))
def test_weights_cut_short_anywhere_are_named(
    model_directory: Path, tmp_path_factory: pytest.TempPathFactory, share: float
):
    content = (model_directory / "model.safetensors").read_bytes()
    directory = tmp_path_factory.mktemp("cut")
    (directory / "model.safetensors").write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as caught:
        models.check_weights(directory)

    assert caught.value.exit_code == 2


def test_a_model_with_damaged_weights_is_refused(model_copy: Path):
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        models.load_model(str(model_copy), device=CPU)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"version": "1.0", "added_tokens": [], "model": {}}']
)
def test_a_damaged_tokenizer_is_refused(model_copy: Path, content: bytes):
    (model_copy / "tokenizer.json").write_bytes(content)

    with pytest.raises(ModelError, match=r"tokenizer\.json.*fetch or save the model again"):
        models.load_tokenizer(str(model_copy))


def test_the_context_is_read_from_the_configuration_alone(model_copy: Path):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "tokenizer.json").unlink()

    assert models.context_tokens(str(model_copy)) == 64


def test_a_damaged_configuration_is_named(model_copy: Path):
    (model_copy / "config.json").write_text("{")

    with pytest.raises(ModelError, match=r"config\.json cannot be loaded"):
        models.context_tokens(str(model_copy))


def test_a_full_model_comes_back_in_float32_beside_a_bfloat16_base(
    model_directory: Path, base: LoadedModel, tmp_path: Path
):
    models.save_trained(base.model, base.tokenizer, tmp_path)
    rounded = models.load_model(str(model_directory), dtype="bfloat16", device=CPU)

    trained = models.load_trained(rounded, tmp_path)

    assert rounded.model.dtype == torch.bfloat16
    pairs = zip(trained.parameters(), base.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_damaged_adapter_is_named(
    training_spec: Callable[..., TrainingSpec], base: LoadedModel, tmp_path: Path
):
    adapted = models.attach_lora(base.model, training_spec())
    models.save_trained(adapted, base.tokenizer, tmp_path)
    models.detach_adapter(adapted)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])

    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        models.load_trained(base, tmp_path)


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
