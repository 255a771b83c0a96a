import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fixtures.tiny import write_tiny_world

# How long an example takes depends on what else the machine does: no clock decides a test.
settings.register_profile("tell", deadline=None)
settings.load_profile("tell")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session", autouse=True)
def quiet_services():
    """No telemetry, no waiting for hubs or servers that are not there."""
    before = dict(os.environ)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.clear()
    os.environ.update(before)
