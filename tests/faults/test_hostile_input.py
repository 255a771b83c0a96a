"""Files made to run code, in every place where a file is read: refused, and nothing was run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tell_core.bundles.exporting import export_bundles
from tell_core.bundles.importing import import_bundles
from tell_core.bundles.layout import (
    BUNDLE_FILE,
    RESULT_FILE,
    BundleError,
    read_sealed,
    write_sealed,
)
from tell_core.data.rendering import Example
from tell_core.errors import ModelError, SpecError, TellError
from tell_core.pipeline import curate_stage, renderer_of
from tell_core.results import open_run
from tell_core.spec.loading import load_spec
from tell_core.store import read_json
from tell_core.training.models import context_tokens, load_model, load_tokenizer, load_trained
from tell_core.training.probes import load_probe
from tests.fixtures.tiny import write_tiny_spec


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.mark, "unpickled")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Appears when hostile code was run."""
    return tmp_path / "code was run"


@pytest.fixture
def model(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the base model, to be made hostile."""
    return Path(shutil.copytree(tiny_world / "base_init", tmp_path / "model"))


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(read_json(path) | fields))


def test_pickled_weights_beside_none_are_refused_with_the_mend(model: Path, mark: Path):
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    torch.save({"weight": Bomb(mark)}, model / "pytorch_model.bin")

    with pytest.raises(ModelError, match="save the model again with `save_pretrained`"):
        load_model(str(model))

    assert not mark.exists()


def test_pickled_weights_beside_safetensors_are_left_unread(model: Path, mark: Path):
    torch.save({"weight": Bomb(mark)}, model / "pytorch_model.bin")

    load_model(str(model))

    assert not mark.exists()


@pytest.mark.parametrize("load", [load_model, load_tokenizer, context_tokens])
def test_code_that_a_model_brings_is_not_run(
    load: Callable[[str], object], model: Path, mark: Path
):
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('imported')\n"
    (model / "evil.py").write_text(code)
    evil = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    change_json(model / "config.json", auto_map=evil, model_type="evil")
    change_json(model / "tokenizer_config.json", auto_map=evil, tokenizer_class="EvilTokenizer")

    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(model))

    assert not mark.exists()


def test_a_pickled_adapter_is_not_read(model: Path, mark: Path, tmp_path: Path):
    adapter = tmp_path / "trained" / "adapter"
    adapter.mkdir(parents=True)
    torch.save({"weight": Bomb(mark)}, adapter / "adapter_model.bin")
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))

    with pytest.raises(ModelError, match="safetensors"):
        load_trained(load_model(str(model)), adapter.parent)

    assert not mark.exists()


def test_a_chat_template_cannot_reach_python(tiny_world: Path, mark: Path, tmp_path: Path):
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__init__.__globals__ }}"
    (tmp_path / "evil.jinja").write_text(reach)
    spec = write_tiny_spec(
        tmp_path / "spec.yaml", tiny_world,
        model={"chat_template": str(tmp_path / "evil.jinja")},
    )  # fmt: skip

    with pytest.raises(TellError, match="unsafe"):
        renderer_of(load_spec(spec)).encode([Example("a", "b")])


def test_a_pickled_probe_trace_is_refused(mark: Path, tmp_path: Path):
    bomb = np.array([Bomb(mark)], dtype=object)
    np.savez(tmp_path / "probe.npz", steps=np.arange(1), losses=bomb)

    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_probe(tmp_path / "probe.npz")

    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:pathlib.Path.write_text [!!python/name:x '', 'y']",
        "!!python/object/new:os.system [echo]",
        "name: !!python/module:os",
    ],
)
def test_a_specification_that_builds_python_objects_is_refused(text: str, tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(text)

    with pytest.raises(SpecError):
        load_spec(tmp_path / "spec.yaml")


def test_a_specification_that_grows_without_bound_is_refused_in_bounded_time(tmp_path: Path):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "spec.yaml").write_text("\n".join(rows))

    with pytest.raises(SpecError, match="aliases written out"):
        load_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize("make", [pickle.dumps, lambda bomb: b"\x80\x04." + pickle.dumps(bomb)])
def test_a_pickle_named_as_data_is_read_as_text_that_is_no_data(
    make: Callable[[Bomb], bytes], tiny_world: Path, mark: Path, tmp_path: Path
):
    (tmp_path / "train.jsonl").write_bytes(make(Bomb(mark)))
    spec = load_spec(
        write_tiny_spec(
            tmp_path / "spec.yaml", tiny_world, task={"train": str(tmp_path / "train.jsonl")}
        )
    )

    with pytest.raises(TellError, match=r"train\.jsonl"):
        curate_stage(spec, tmp_path / "out")

    assert not mark.exists()


def test_code_that_a_bundle_names_is_not_run(
    tiny_world: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    changes = {"arms": ["base"], "seeds": [0], "training": {"learning_rate": 0.003}}
    spec = load_spec(write_tiny_spec(tmp_path / "spec.yaml", tiny_world, **changes))
    root, bundle = tmp_path / "run", tmp_path / "bundles" / "base-s0"
    open_run(spec, root)
    export_bundles(spec, root, bundle.parent)
    fields = read_sealed(bundle / BUNDLE_FILE)
    metrics = [{"name": "bundles.evil:score"}, {"name": "exact_match"}]
    fields["spec"]["evaluation"]["metrics"] = metrics
    changed = write_sealed(bundle / BUNDLE_FILE, fields)
    write_sealed(
        bundle / RESULT_FILE, {"bundle": changed["digest"], "outcome": "finished", "files": {}}
    )
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('imported')\n"
    (bundle.parent / "evil.py").write_text(code + "def score(item, answer):\n    return 1.0\n")

    with pytest.raises(BundleError, match="not exported from"):
        import_bundles([bundle], root)

    assert not mark.exists()
