"""A whole run on a team's servers: Prefect and MLflow on PostgreSQL, artifacts in an S3 store."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.fixtures.tiny import write_tiny_spec
from tests.servers.conftest import (
    S3_KEY,
    S3_SECRET,
    answers,
    end,
    free_port,
    s3_client,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_S3 = {
    "AWS_ACCESS_KEY_ID": S3_KEY,
    "AWS_SECRET_ACCESS_KEY": S3_SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def prefect_address(postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on PostgreSQL."""
    port = free_port()
    database = f"postgresql+asyncpg://tell@127.0.0.1:{postgres}/prefect"
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start"], env=environment
    )
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/health"), process)
    yield f"http://127.0.0.1:{port}/api"
    end(process)


@pytest.fixture(scope="module")
def mlflow_address(postgres: int, object_store: str) -> Iterator[str]:
    """An MLflow server on PostgreSQL that keeps artifacts in the object store."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"),
            *("--port", str(port), "--artifacts-destination", "s3://tell/artifacts"),
            *("--backend-store-uri", f"postgresql://tell@127.0.0.1:{postgres}/mlflow"),
        ],
        env=os.environ | _S3 | {
            "MLFLOW_S3_ENDPOINT_URL": object_store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
    )  # fmt: skip
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), process)
    yield f"http://127.0.0.1:{port}"
    end(process)


def test_a_run_is_orchestrated_recorded_and_its_model_comes_back(
    prefect_address: str, mlflow_address: str, object_store: str, tiny_world: Path, tmp_path: Path
):
    spec = write_tiny_spec(
        tmp_path / "tiny.yaml", tiny_world, arms=["base", "sft", "tell"], seeds=[0],
        budgets={"task_tokens": [200]}, training={"learning_rate": 0.001},
    )  # fmt: skip
    own = {"PREFECT_API_URL": prefect_address, "MLFLOW_TRACKING_URI": mlflow_address}
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(tmp_path / "run")]

    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert _answer_of("models:/tiny-veil@challenger", mlflow_address) == 1
    assert _objects(object_store, "artifacts/")
    assert _states(prefect_address) == {"COMPLETED"}


def test_the_object_store_refuses_whoever_has_another_key(object_store: str):
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3_client(object_store, "a-guess").list_objects_v2(Bucket="tell")


def _answer_of(uri: str, mlflow_address: str) -> int:
    """How many answers the registered model gives to one prompt, its files from the store."""
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(mlflow_address)
    return len(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"prompt": ["ABCD"]})))


def _objects(address: str, prefix: str) -> list[str]:
    listed = s3_client(address).list_objects_v2(Bucket="tell", Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def _states(prefect_address: str) -> set[str]:
    """States of the flow runs that the server keeps."""
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(prefect_address) as client:
        return {str(run.state_type.value) for run in client.read_flow_runs() if run.state_type}
