"""Code that a model brings runs only when every file of it is on the user's own list."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from flows.cli import app
from tell_core.errors import ModelError
from tell_core.store import read_json
from tell_core.training.models import (
    fetch_with_code,
    load_model,
    load_tokenizer,
    model_digest,
    save_trained,
)
from tell_core.trusted_code import allow, allowed_code, brings_code, forbid, may_run_code

# A Llama under a name that transformers does not know.
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
CLASSES = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory of the test's own, where nothing is allowed yet."""
    torch.set_num_threads(1)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return tmp_path / "home"


@pytest.fixture
def model(tiny_world: Path, tmp_path: Path) -> Path:
    """A base model that needs code of its own."""
    directory = Path(shutil.copytree(tiny_world / "base_init", tmp_path / "own"))
    (directory / "modeling_own.py").write_text(CODE)
    config = read_json(directory / "config.json")
    config |= {"auto_map": CLASSES, "model_type": "own-llama", "architectures": ["OwnModel"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_code_is_refused_with_the_mend_and_runs_once_allowed(model: Path):
    with pytest.raises(ModelError, match=f"tell trust add {model}"):
        load_model(str(model))

    allow(model, str(model), None)

    assert type(load_model(str(model)).model).__name__ == "OwnModel"


def test_a_changed_file_is_refused_again(model: Path):
    allow(model, str(model), None)
    (model / "modeling_own.py").write_text(CODE + "\nraise SystemExit('it ran')\n")

    with pytest.raises(ModelError, match="not run before you have read"):
        load_model(str(model))


def test_a_file_that_came_later_is_refused(model: Path):
    allow(model, str(model), None)
    (model / "more.py").write_text("raise SystemExit('it ran')\n")

    assert not may_run_code(model)


def test_what_was_trained_on_such_a_model_loads_with_the_same_code(model: Path, tmp_path: Path):
    allow(model, str(model), None)
    loaded = load_model(str(model), is_full=True)

    save_trained(loaded.model, loaded.tokenizer, tmp_path / "trained")
    again = load_model(str(tmp_path / "trained" / "model"), is_full=True)

    assert type(again.model).__name__ == "OwnModel"
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    )


def test_what_is_no_longer_allowed_does_not_run(model: Path):
    allow(model, str(model), None)

    removed = forbid(str(model))

    assert [entry.file for entry in removed] == ["modeling_own.py"]
    assert not may_run_code(model)


def test_code_of_another_repository_is_never_allowed(model: Path):
    config = read_json(model / "config.json")
    config["auto_map"]["AutoConfig"] = "someone/else--modeling_own.OwnConfig"
    (model / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match="another repository"):
        allow(model, str(model), None)

    assert allowed_code() == []


def test_files_that_no_class_is_taken_from_are_no_code_of_the_model(tiny_world: Path, tmp_path):
    directory = Path(shutil.copytree(tiny_world / "base_init", tmp_path / "plain"))
    (directory / "convert.py").write_text("raise SystemExit('it ran')\n")

    assert not brings_code(directory)
    with pytest.raises(ModelError, match="brings no code"):
        allow(directory, str(directory), None)
    assert load_tokenizer(str(directory))


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc", "g" * 40])
def test_a_hub_model_needs_the_full_hash_of_a_commit(revision: str | None):
    with pytest.raises(ModelError, match="full hash of 40 digits"):
        fetch_with_code("someone/model", revision)


def test_code_counts_for_a_models_identity_where_it_runs(model: Path):
    before = model_digest(model)
    allow(model, str(model), None)
    allowed = model_digest(model)
    (model / "modeling_own.py").write_text(CODE + "\n# changed\n")
    allow(model, str(model), None)

    assert len({before, allowed, model_digest(model)}) == 3


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}\.py", fullmatch=True),
        st.binary(max_size=20),
        min_size=1,
        max_size=4,
    ),
    changed=st.data(),
)
def test_one_other_byte_in_any_file_is_enough(files, changed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "a.B"}}))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    allow(directory, str(directory), None)
    was_allowed = may_run_code(directory)

    struck = changed.draw(st.sampled_from(sorted(files)))
    (directory / struck).write_bytes(files[struck] + b"#" + struck.encode())

    assert was_allowed
    assert not may_run_code(directory)
    forbid(str(directory))


def test_the_command_shows_the_files_and_allows_nothing_unasked(model: Path, home: Path):
    runner = CliRunner()

    refused = runner.invoke(app, ["trust", "add", str(model)])
    allowed = runner.invoke(app, ["trust", "add", str(model), "--yes"])
    listed = runner.invoke(app, ["trust", "list", "--json"])
    removed = runner.invoke(app, ["trust", "remove", str(model)])
    unknown = runner.invoke(app, ["trust", "remove", str(model)])

    assert (refused.exit_code, allowed.exit_code, removed.exit_code) == (1, 0, 0)
    assert "modeling_own.py" in refused.stdout
    assert [entry["file"] for entry in json.loads(listed.stdout)] == ["modeling_own.py"]
    assert unknown.exit_code == 2
    assert allowed_code() == []
