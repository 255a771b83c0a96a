"""Text from data that tries to run as code, on Prefect's own pages and on the corpus page."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tell_core.pipeline import CORPUS_PAGE, curate_stage
from tell_core.spec.loading import load_spec
from tests.browser.chromium import Browser, missing_parts, start_chromium
from tests.browser.conftest import HOSTILE
from tests.fixtures.tiny import write_tiny_spec
from tests.flows.test_services import free_port

ONLINE = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
PATIENCE_SECONDS = 120.0
SEEN = "visible-mark"
ARTIFACTS: dict[str, Any] = {
    "table": [{"source": HOSTILE + SEEN, "set aside": f"3 {HOSTILE}"}],
    "markdown": f"# {HOSTILE}\n\n{SEEN} {HOSTILE} [link](javascript:window.hacked=6)",
}


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect server with its pages."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_SERVER_API_PORT", str(port))
        command = [sys.executable, "-m", "prefect", "server", "start"]
        process = subprocess.Popen(command)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if httpx.get(f"{address}/api/health", timeout=5.0).is_success:
                break
        except httpx.HTTPError:
            assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.3)
    yield address
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that reaches servers on this machine."""
    if missing := missing_parts(shutil.which):
        pytest.skip(f"no browser to look at pages in: {missing} not found")
    browser = start_chromium(tmp_path_factory.mktemp("downloads"))
    browser.command("Network.emulateNetworkConditions", ONLINE)
    yield browser
    browser.quit()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ARTIFACTS)
def test_hostile_text_in_an_artifact_is_shown_and_never_run(
    kind: str, prefect: str, online: Browser
):
    content = {"key": f"hostile-{kind}", "type": kind, "data": ARTIFACTS[kind]}
    made = httpx.post(f"{prefect}/api/artifacts/", json=content, timeout=30.0)
    made.raise_for_status()

    online.driver.get(f"{prefect}/artifacts/artifact/{made.json()['id']}")

    deadline = time.monotonic() + PATIENCE_SECONDS
    while SEEN not in str(online.run("return document.body ? document.body.innerText : ''")):
        assert time.monotonic() < deadline, "the artifact was not shown"
        time.sleep(0.5)
    time.sleep(1.0)  # an image that fails to load would run its handler by now
    assert online.run("return window.hacked === undefined")
    # Prefect leaves such a link in Markdown, to be clicked: texts from data go into tables only.
    if kind == "table":
        links = "return document.querySelectorAll('a[href^=\"javascript:\"]').length"
        assert online.run(links) == 0


def test_hostile_rows_on_the_corpus_page_are_shown_and_never_run(
    browser: Browser, tiny_world: Path, tmp_path: Path
):
    rows = (tiny_world / "task_train.jsonl").read_text().splitlines()
    bad = '{"prompt": "' + "<script>window.hacked = 1</script>" + '", "response": 7}'
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, bad]) + "\n")
    spec = write_tiny_spec(
        tmp_path / "spec.yaml", tiny_world, task={"train": str(tmp_path / "train.jsonl")}
    )
    curated = curate_stage(load_spec(spec), tmp_path / "run")

    browser.open(curated.path / CORPUS_PAGE)

    assert "window.hacked = 1" in (curated.path / CORPUS_PAGE).read_text()
    assert browser.run("return window.hacked === undefined")
