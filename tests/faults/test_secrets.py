"""A planted secret - in an address, in the environment - is in no file, log or record of a run."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tasks.stores import tracking_uri
from tasks.tracking import connect
from tell_core.errors import InputError
from tests.fixtures.tiny import write_tiny_spec

SECRET = "correct-horse-battery-staple"
# Where people keep theirs: tracking server, object store, model hub, database.
PLACES = (
    *("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD"),
    *("PREFECT_API_KEY", "DATABASE_URL"),
)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret in every place of the environment where one may be."""
    for name in PLACES:
        value = f"postgresql://tell:{SECRET}@db/tell" if name == "DATABASE_URL" else SECRET
        monkeypatch.setenv(name, value)


def files_with_secret(directory: Path) -> list[str]:
    return [
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_file_database_log_or_output_of_a_whole_run_holds_a_secret(
    planted: None, tiny_world: Path, tmp_path: Path
):
    spec = write_tiny_spec(
        tmp_path / "spec.yaml", tiny_world, arms=["base", "sft", "tell"], seeds=[0],
        budgets={"task_tokens": [200]}, training={"learning_rate": 0.001},
    )  # fmt: skip
    root = tmp_path / "runs" / "tiny"
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(root)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr[-4000:]
    held = {path.name for path in tmp_path.rglob("*")}
    assert {"prefect.db", "server.log", "mlflow.db", "report.html", "MLmodel"} <= held
    assert files_with_secret(tmp_path) == []
    assert SECRET not in done.stdout + done.stderr
    assert SECRET in os.environ["HF_TOKEN"]


def test_the_error_of_a_server_out_of_reach_holds_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://tell:{SECRET}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")

    with pytest.raises(InputError, match="cannot be used") as raised:
        connect(tmp_path)

    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == SECRET


def test_the_address_of_a_database_keeps_its_user_and_loses_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PGPASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://tell:{SECRET}@db:5432/tell")

    assert tracking_uri(tmp_path) == "postgresql://tell@db:5432/tell"
    assert os.environ["PGPASSWORD"] == SECRET
