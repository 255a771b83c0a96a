"""The compose file is what the README says: parsed, without passwords, on loopback only."""

import re
from typing import Any

import pytest
import yaml
from mlflow import environment_variables as variables
from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields

from tests.servers.compose import DIRECTORY


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


def test_every_setting_of_the_servers_is_one_that_they_know(services: dict[str, Any]):
    known = {variable.name for variable in vars(variables).values() if hasattr(variable, "name")}
    known |= set(_get_settings_fields(Settings)) | {
        "MLFLOW_BACKEND_STORE_URI"
    }  # read by its command
    given = {name for server in ("prefect", "mlflow") for name in services[server]["environment"]}

    assert {name for name in given if name.startswith(("PREFECT_", "MLFLOW_"))} <= known


def test_pages_call_the_address_that_the_browser_has(services: dict[str, Any]):
    prefect, mlflow = services["prefect"]["environment"], services["mlflow"]["environment"]

    assert prefect["PREFECT_SERVER_UI_API_URL"].startswith("${PREFECT_PUBLIC_URL")
    assert mlflow["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].startswith("${MLFLOW_PUBLIC_URL")


def test_the_databases_that_the_servers_name_are_created(services: dict[str, Any]):
    created = re.findall(r"create database (\w+)", (DIRECTORY / "create-databases.sql").read_text())
    urls = [
        services["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"],
        services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"],
    ]

    assert sorted(url.rpartition("/")[2] for url in urls) == sorted(created)
