"""The compose file is what the README says: parsed, without passwords, on loopback only."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "servers"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    text = (DIRECTORY / "compose.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text)["services"])


def test_every_port_is_published_on_loopback_only(services: dict[str, Any]):
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_password_comes_from_outside(services: dict[str, Any]):
    secret = re.compile("PASSWORD|SECRET|AUTH|_KEY")

    for service in services.values():
        for name, value in service.get("environment", {}).items():
            assert not secret.search(name) or value.startswith("${"), name


def test_every_variable_without_a_default_is_in_the_readme(services: dict[str, Any]):
    named = set(re.findall(r"\$\{(\w+)", yaml.safe_dump(services)))
    readme = (DIRECTORY / "README.md").read_text(encoding="utf-8")

    assert named
    assert all(f"{name}=" in readme for name in named)


def test_the_databases_that_the_servers_name_are_created(services: dict[str, Any]):
    created = re.findall(r"create database (\w+)", (DIRECTORY / "create-databases.sql").read_text())
    urls = [
        services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"],
        services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"],
    ]

    assert sorted(url.rpartition("/")[2] for url in urls) == sorted(created)
