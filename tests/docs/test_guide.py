"""The guide's blocks do what they say, on data and a model of its names that fit into a minute."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.json
import pyarrow.parquet as pq
import pytest
import yaml

from tests.docs.blocks import Block, blocks

PROJECT = Path(__file__).resolve().parents[2]
GUIDE = PROJECT / "docs" / "user-guide.md"
# The guide's own specification, on a world that has hundreds of tokens instead of millions.
SIZE = {
    "arms": ["base", "sft", "tell"],
    "seeds": [0, 1],
    "budgets": {"task_tokens": [200, 400, 800], "general_tokens": 800},
    "curation": {"max_tokens": 64, "general_heldout_examples": 4},
    "training": {"learning_rate": 0.001, "min_steps": 0, "method": "full"},
    "evaluation": {"metrics": ["exact_match"], "max_items": 12, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def workshop(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the guide takes for granted, under the names it uses."""
    here = tmp_path_factory.mktemp("workshop")
    shutil.copy(tiny_world / "task_train.jsonl", here / "train.jsonl")
    shutil.copy(tiny_world / "task_test.jsonl", here / "test.jsonl")
    general = pyarrow.json.read_json(tiny_world / "general.jsonl")
    pq.write_table(general, here / "general.parquet")
    shutil.copytree(tiny_world / "base_init", here / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    return here


def run_block(block: Block, here: Path) -> None:
    """Run a shell block; write a Python or YAML block to the file that it names, or run it.

    Raises:
        AssertionError: A command failed.
    """
    if block.language == "yaml" and block.text.startswith("name: "):
        fields = yaml.safe_load(block.text) | SIZE
        (here / "my-task.yaml").write_text(yaml.safe_dump(fields))
    elif block.language == "python" and block.text.startswith("# "):
        (here / block.text.split()[1]).write_text(block.text)
    elif block.language == "python":
        _call([sys.executable, "-c", block.text], here)
    elif block.language == "sh":
        _call(["bash", "-e", "-c", block.text], here)


def _call(command: list[str], here: Path) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": tools, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_guide_can_be_followed_from_top_to_bottom(workshop: Path):
    to_run = [block for block in blocks(GUIDE) if block.why_not is None]

    for block in to_run:
        run_block(block, workshop)

    assert (workshop / "runs" / "my-task" / "report.html").is_file()


def test_every_block_that_is_not_run_says_why():
    left_out = [block for block in blocks(GUIDE) if block.why_not is not None]

    assert left_out
    assert all(len(str(block.why_not)) > 10 for block in left_out)
