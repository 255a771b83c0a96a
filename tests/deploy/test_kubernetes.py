"""The files for Prefect on Kubernetes: rendered as its worker renders them, checked by the schemas.

No cluster takes part. Without the packages `prefect-kubernetes` and `kubernetes-validate` the tests
that need them are skipped.
"""

import asyncio
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
FILES = PROJECT / "deploy" / "kubernetes"
IMAGE = "registry.example.org/tell:0.1.0"
SERVED_SINCE = "1.29"  # the oldest Kubernetes whose schemas the files are checked against
TAKE_AWAY = """#!/bin/sh
for word in "$@"; do
  case "$word" in *.json|*.yaml) cp "$word" "{kept}/" ;; esac
done
echo "$@" >> "{kept}/calls"
"""


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    """What deploy.sh gives to Prefect's command line, kept by a stand-in for it."""
    stand_in = tmp_path / "bin" / "prefect"
    stand_in.parent.mkdir()
    stand_in.write_text(TAKE_AWAY.format(kept=tmp_path))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {
        "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_API_URL": "http://prefect.example.org/api",
        "TELL_IMAGE": IMAGE,
        "TELL_DATA": "/data/input",
        "TELL_GPUS": "2",
    }
    subprocess.run([str(FILES / "deploy.sh")], cwd=PROJECT, env=environment, check=True)
    return tmp_path


def manifest(template: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
    """The job that Prefect's Kubernetes worker would create for a run with these variables."""
    worker = pytest.importorskip("prefect_kubernetes.worker")
    from prefect.client.schemas.objects import FlowRun

    settled = worker.KubernetesWorkerJobConfiguration.from_template_and_values(
        template,
        variables,
        client=object(),  # asked only for blocks and variables, of which there are none
    )
    configuration = asyncio.run(settled)
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="request", flow_id=uuid4()))
    return dict(configuration.job_manifest)


def check_schema(document: dict[str, Any], *, strict: bool) -> None:
    """Check a document against the schemas of Kubernetes."""
    validate: ModuleType = pytest.importorskip("kubernetes_validate")
    validate.validate(document, SERVED_SINCE, strict=strict)


@pytest.mark.parametrize(("queue", "gpus"), [("gpu", 1), ("default", 0)])
def test_a_run_gets_image_volume_secrets_and_a_gpu_where_it_trains(
    deployed: Path, queue: str, gpus: int
):
    template = json.loads((deployed / "pool.json").read_text())
    deployments = yaml.safe_load((deployed / "prefect.yaml").read_text())["deployments"]
    pools = [entry["work_pool"] for entry in deployments]
    variables = next(p["job_variables"] for p in pools if p["work_queue_name"] == queue)

    job = manifest(template, variables)

    check_schema(job, strict=False)  # Prefect wants two fields where Kubernetes knows none
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert {pool["name"] for pool in pools} == {"kubernetes"}
    assert container["image"] == IMAGE
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert container["envFrom"] == [{"secretRef": {"name": "tell-servers"}}]
    assert given["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "tell"}
    assert container["volumeMounts"][0]["mountPath"] == "/data"
    assert job["metadata"]["namespace"] == "tell"


def test_the_queue_lets_as_many_runs_train_as_there_are_gpus(deployed: Path):
    calls = (deployed / "calls").read_text().splitlines()

    assert calls[-1] == "work-queue set-concurrency-limit gpu 2 --pool kubernetes"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / "worker.yaml").read_text()))


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_what_is_applied_fits_the_schemas(document: dict[str, Any]):
    check_schema(document, strict=True)


def test_the_job_for_bundles_fits_the_schemas():
    check_schema(yaml.safe_load((FILES / "cells.yaml").read_text()), strict=True)


def test_the_worker_reads_the_password_from_the_secret_and_jobs_name_it():
    (deployment,) = [found for found in documents() if found["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]

    given = {entry["name"]: entry["value"] for entry in container["env"]}

    assert container["envFrom"] == [{"secretRef": {"name": "tell-servers"}}]
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert given[f"{prefix}_NAME"] == "tell-servers"
    assert given[f"{prefix}_KEY"] == "PREFECT_API_AUTH_STRING"
    settings = pytest.importorskip("prefect_kubernetes.settings").KubernetesWorkerSettings
    assert {"api_auth_string_secret_name", "api_auth_string_secret_key"} <= set(
        settings.model_fields
    )


def test_the_role_allows_what_the_worker_calls():
    package = pytest.importorskip("prefect_kubernetes")
    (role,) = [found for found in documents() if found["kind"] == "Role"]
    allowed = {
        (verb, resource.replace("/", "_"))
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    source = "".join(
        (Path(package.__path__[0]) / name).read_text() for name in ("worker.py", "observer.py")
    )

    called = set(re.findall(r"\b(create|delete|list|patch|read)_namespaced_([a-z_]+)", source))

    needed = {
        ("get" if verb == "read" else verb, "pods_log" if kind == "pod_log" else f"{kind}s")
        for verb, kind in called
        if kind != "secret"  # only for keys of Prefect Cloud, which are not used
    }
    assert needed
    assert needed <= allowed


def test_the_image_holds_what_exists_in_the_versions_that_were_tested():
    text = (FILES / "Dockerfile").read_text()

    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]

    assert all((PROJECT / name).exists() for name in copied)
    assert {"flows", "tasks", "tell_core", "configs", "prefect.yaml", "pyproject.toml"} <= set(
        copied
    )
    assert "--constraint constraints.txt '.[servers]'" in text
    assert "FROM python:3.11" in text
