"""A small experiment, and its cells exported as bundles."""

import shutil
from pathlib import Path

import pytest
import torch

from tell_core.bundles.exporting import export_bundles
from tell_core.bundles.running import run_bundle
from tell_core.results import open_run
from tell_core.spec.model import ExperimentSpec
from tests.fixtures.tiny import tiny_fields

SETTINGS = {"method": "lora", "learning_rate": 0.003, "lora_rank": 2}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def spec(tiny_world: Path) -> ExperimentSpec:
    """One cell of `base` and one of `tell`, nothing to be tuned."""
    fields = tiny_fields(tiny_world)
    return ExperimentSpec.model_validate(
        fields
        | {
            "arms": ["base", "tell"],
            "seeds": [0],
            "budgets": {"task_tokens": 200, "general_tokens": 800},
            "training": fields["training"] | SETTINGS,
            "evaluation": fields["evaluation"] | {"metrics": ["exact_match", "bleu"]},
        }
    )


@pytest.fixture(scope="session")
def exported(spec: ExperimentSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run directory and bundles that no test may change."""
    root = tmp_path_factory.mktemp("exporter") / "run"
    open_run(spec, root)
    export_bundles(spec, root, root.parent / "bundles")
    return root, root.parent / "bundles"


@pytest.fixture(scope="session")
def finished(exported: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundles after they were run; no test may change them."""
    bundles = tmp_path_factory.mktemp("finished") / "bundles"
    shutil.copytree(exported[1], bundles)
    for directory in sorted(bundles.iterdir()):
        run_bundle(directory)
    return bundles


@pytest.fixture
def root(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run directory that was exported from."""
    return shutil.copytree(exported[0], tmp_path / "run")


@pytest.fixture
def bundle(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the trained cell's bundle, not run yet."""
    name = "tell-t200-g800-s0"
    return shutil.copytree(exported[1] / name, tmp_path / "bundles" / name)


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of the trained cell's bundle with its result."""
    name = "tell-t200-g800-s0"
    return shutil.copytree(finished / name, tmp_path / "done" / name)
