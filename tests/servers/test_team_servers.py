"""A whole run on a team's servers: Prefect and MLflow on PostgreSQL, artifacts in an S3 store."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from botocore.exceptions import ClientError

from tests.fixtures.tiny import write_tiny_spec
from tests.servers.compose import service
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

_AUTH = "name:password"
# What the file .env beside compose.yaml says.
_VARIABLES = {
    "POSTGRES_PASSWORD": "not-asked-for-here",
    "S3_KEY_ID": S3_KEY,
    "S3_SECRET_KEY": S3_SECRET,
    "PREFECT_AUTH": _AUTH,
}


@pytest.fixture(scope="module")
def prefect_address(postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Prefect server of compose.yaml, on PostgreSQL, which asks for a password."""
    port = free_port()
    command, environment = service(
        "prefect", _VARIABLES, {"postgres:5432": f"127.0.0.1:{postgres}", "0.0.0.0": "127.0.0.1"}
    )
    own = {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_API_PORT": str(port),
    }
    process = subprocess.Popen(command, env=os.environ | environment | own)
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/health"), process)
    yield f"http://127.0.0.1:{port}/api"
    end(process)


@pytest.fixture(scope="module")
def mlflow_address(postgres: int, object_store: str) -> Iterator[str]:
    """The MLflow server of compose.yaml, on PostgreSQL, its artifacts in the object store."""
    port = free_port()
    addresses = {
        "postgres:5432": f"127.0.0.1:{postgres}",
        "http://objects:9000": object_store,
        "0.0.0.0 --port 5000": f"127.0.0.1 --port {port}",
    }
    command, environment = service("mlflow", _VARIABLES, addresses)
    process = subprocess.Popen(command, env=os.environ | environment)
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
    own = {
        "PREFECT_API_URL": prefect_address,
        "PREFECT_API_AUTH_STRING": _AUTH,
        "MLFLOW_TRACKING_URI": mlflow_address,
    }
    command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--out", str(tmp_path / "run")]

    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert _answer_of("models:/tiny-veil@challenger", mlflow_address) == 1
    assert _objects(object_store, "artifacts/")
    assert _states(prefect_address) == {"COMPLETED"}


def test_prefect_asks_for_the_password_everywhere_but_for_its_health(prefect_address: str):
    wanted = ("flows/filter", "deployments/filter", "variables/filter")

    codes = {httpx.post(f"{prefect_address}/{path}", json={}).status_code for path in wanted}

    assert codes == {401}
    right = httpx.BasicAuth(*_AUTH.split(":"))
    assert httpx.post(f"{prefect_address}/flows/filter", json={}, auth=right).is_success


def test_mlflow_refuses_a_page_of_another_address(mlflow_address: str):
    path = f"{mlflow_address}/api/2.0/mlflow/experiments/create"
    foreign = {"Origin": "https://elsewhere.example.org"}

    answer = httpx.post(path, json={"name": "from elsewhere"}, headers=foreign)

    assert answer.status_code == 403


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

    with SyncPrefectClient(prefect_address, auth_string=_AUTH) as client:
        return {str(run.state_type.value) for run in client.read_flow_runs() if run.state_type}
