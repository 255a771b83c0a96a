"""Running bundles, in this process and as a machine without the project's other packages does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tell_core.bundles.__main__ import main, share_of
from tell_core.bundles.layout import (
    BUNDLE_FILE,
    BundleError,
    pack,
    read_bundle,
    read_result,
    read_sealed,
    write_sealed,
)
from tell_core.bundles.running import run_bundle
from tell_core.errors import InputError
from tell_core.training.trainer import DivergedError

CHECKOUT = Path(__file__).parents[3]
ABSENT = (
    "pydantic", "pydantic_core", "typer", "prefect", "mlflow", "duckdb", "datasets", "pyarrow",
    "pandas", "sacrebleu", "scipy", "sklearn", "matplotlib", "trl", "lm_eval",
)  # fmt: skip
# Packages that are not there: nobody finds them, as on a machine where they are not installed.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

class Fewer(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

absent = set(sys.argv[1].split(","))
sys.meta_path[:] = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv[:] = ["tell_core.bundles", *sys.argv[2:]]
try:
    runpy.run_module("tell_core.bundles", run_name="__main__", alter_sys=True)
finally:
    found = absent & {name.split(".")[0] for name in sys.modules}
    print("IMPORTED", sorted(found), file=sys.stderr)
"""


def start(*arguments: object) -> "subprocess.Popen[str]":
    """``python -m tell_core.bundles`` from the checkout, without the absent packages."""
    command = [sys.executable, "-c", WITHOUT, ",".join(ABSENT), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def made(directory: Path) -> dict[str, bytes]:
    """Weights, probe losses and answers that a bundle brought back."""
    names = ("train-*/adapter/adapter_model.safetensors", "train-*/probe.npz", "measure-*/*.json")
    return {
        path.name: path.read_bytes() for name in names for path in directory.glob(f"stages/{name}")
    }


def prolonged(bundle: Path, epochs: int) -> Path:
    """The same bundle with a training long enough to be killed in."""
    import numpy as np

    from tell_core.bundles.layout import describe_files, files_below
    from tell_core.data.encoding import Mixture

    path = bundle / "inputs" / "mixture.safetensors"
    mixture = Mixture.load(path)
    Mixture(mixture.examples, np.tile(mixture.order, epochs)).save(path)
    files = describe_files(bundle, files_below(bundle / "inputs"))
    fields = read_sealed(bundle / BUNDLE_FILE) | {"files": files}
    fields["spec"]["training"]["checkpoint_seconds"] = 0.2
    write_sealed(bundle / BUNDLE_FILE, fields)
    return bundle


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_shares_are_disjoint_and_together_everything(numbers: list[int], count: int):
    paths = [Path(f"{n}-{position}") for position, n in enumerate(numbers)]

    shares = [share_of(paths, f"{index}/{count}") for index in range(count)]

    assert sorted(path for share in shares for path in share) == sorted(paths)


@pytest.mark.parametrize("share", ["8/8", "1", "a/b", "-1/2", "1/"])
def test_a_share_that_is_none_is_refused(share: str):
    with pytest.raises(InputError, match="I/N"):
        share_of([], share)


def test_without_the_absent_packages_the_result_is_the_same(bundle: Path, finished: Path):
    process = start("run", bundle)

    output, errors = process.communicate(timeout=120)

    assert process.returncode == 0, errors
    assert "finished" in output
    assert "IMPORTED []" in errors
    assert made(bundle) == made(finished / bundle.name)


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_bits(bundle: Path, tmp_path: Path):
    prolonged(bundle, epochs=60)
    unbroken = shutil.copytree(bundle, tmp_path / "unbroken")
    process = start("run", bundle)
    deadline = time.monotonic() + 120
    while not list(bundle.glob("stages/train-*.partial/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(bundle.glob("result.json"))
    run_bundle(bundle)
    run_bundle(unbroken)

    assert made(bundle) == made(unbroken)


@pytest.mark.slow
def test_asked_to_stop_it_writes_a_checkpoint_and_says_so_by_its_exit_code(bundle: Path):
    prolonged(bundle, epochs=2000)
    process = start("run", bundle)
    while not list(bundle.glob("stages/train-*.partial/log.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert list(bundle.glob("stages/train-*.partial/checkpoints/step-*"))


def test_a_finished_bundle_is_not_run_again(done: Path):
    before = read_result(done, read_bundle(done))

    assert run_bundle(done, model=Path("there/is/no/model")) == before


def test_a_damaged_result_is_made_again(done: Path):
    answers = next(done.glob("stages/measure-*/measured.json"))
    content = answers.read_bytes()
    answers.write_bytes(content[:-3])

    run_bundle(done)

    assert answers.read_bytes() == content
    assert read_result(done, read_bundle(done)) is not None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_base_model_is_refused(bundle: Path, tiny_world: Path, tmp_path: Path, name: str):
    other = shutil.copytree(tiny_world / "base_init", tmp_path / "other")
    content = (other / name).read_bytes()
    (other / name).write_bytes(content + b"\n" if name.endswith("json") else content[:-1] + b"\x01")

    with pytest.raises(BundleError, match=r"not the base model|is damaged"):
        run_bundle(bundle, model=other)


def test_damage_is_refused_by_the_command_too(bundle: Path, capsys: pytest.CaptureFixture[str]):
    items = bundle / "inputs" / "items.jsonl"
    items.write_text(items.read_text().replace("a", "b", 1))

    codes = [main([command, str(bundle)]) for command in ("check", "run")]

    assert codes == [2, 2]
    assert "items.jsonl is damaged" in capsys.readouterr().err


def test_a_folder_is_run_one_after_another_and_a_failure_stops_no_other(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bundles = shutil.copytree(exported[1], tmp_path / "bundles")
    (bundles / "base-s0" / "inputs" / "items.jsonl").write_text("")
    cell = bundles / "tell-t200-g800-s0"
    pack(cell)
    shutil.rmtree(cell)

    code = main(["run", str(bundles), "--device", "cpu", "--threads", "1"])

    assert code == 2
    assert "[2/2] tell-t200-g800-s0: finished" in capsys.readouterr().out
    assert read_result(cell, read_bundle(cell)) is not None


def test_a_cell_that_diverges_fails_but_a_tuning_that_does_is_a_result(bundle: Path):
    fields = read_sealed(bundle / BUNDLE_FILE)
    fields["spec"]["training"] |= {"learning_rate": 1e30, "batch_size": 4}
    write_sealed(bundle / BUNDLE_FILE, fields)
    with pytest.raises(DivergedError):
        run_bundle(bundle)
    write_sealed(bundle / BUNDLE_FILE, fields | {"kind": "tuning"})

    result = run_bundle(bundle)

    assert result["outcome"] == "diverged"
    assert result["files"] == {}
    assert "Lower the learning rate" in result["message"]
    assert json.loads((bundle / "result.json").read_text()) == result
