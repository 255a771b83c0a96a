"""Fault drills: everything here carries the marker ``faults``, so that ``make faults`` runs all."""

from pathlib import Path

import pytest

from tests.faults.whole_run import run_whole
from tests.fixtures.tiny import write_tiny_spec

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def drill_spec(tmp_path_factory: pytest.TempPathFactory, tiny_world: Path) -> Path:
    """An experiment that writes a checkpoint at nearly every step, so that kills hit them too."""
    return write_tiny_spec(
        tmp_path_factory.mktemp("drill") / "drill.yaml",
        tiny_world,
        arms=["base", "sft", "tell"],
        budgets={"task_tokens": [200, 400]},
        training={"epochs": 4, "checkpoint_seconds": 0.001},
    )


@pytest.fixture(scope="session")
def unbroken(drill_spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of that experiment when nothing disturbs it; leave it as it is."""
    root = tmp_path_factory.mktemp("unbroken") / "tiny"
    run_whole(drill_spec, root)
    return root
