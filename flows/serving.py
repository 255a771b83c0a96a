"""What every server started here needs: its environment, and waiting until it answers."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

HOST = "127.0.0.1"
START_SECONDS = 180.0
STOP_SECONDS = 10.0
_LOOK_EVERY_SECONDS = 0.2


def prefect_environment(home: Path, port: int) -> dict[str, str]:
    """What a Prefect server on this machine is told: loopback only, no telemetry."""
    return {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "DO_NOT_TRACK": "1",
    }


def answers(url: str) -> bool:
    """Whether a server answers with 200 within five seconds."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5.0).status_code == httpx.codes.OK
    return False


def await_answer(url: str, is_running: Callable[[], bool]) -> bool:
    """Wait until a server answers; False when it ended before, or takes more than three minutes."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and is_running():
        if answers(url):
            return True
        time.sleep(_LOOK_EVERY_SECONDS)
    return False
