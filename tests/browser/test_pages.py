"""A walk through the pages of a scheduled run: Prefect's, MLflow's and our report.

With TELL_SCREENSHOTS=DIRECTORY each page is also saved there for the documentation.
"""

import os
import shutil
import time
from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from tell_core.store import read_json
from tests.browser.chromium import Browser, missing_parts, start_chromium
from tests.browser.screenshots import compressed
from tests.fixtures.platform import Platform, platform
from tests.fixtures.tiny import write_tiny_spec, write_tiny_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAME = "tiny-veil"
ONLINE = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
PATIENCE_SECONDS = 90.0


class Scene(NamedTuple):
    """Servers, what ran on them, and a browser that reaches them."""

    servers: Platform
    run: dict[str, Any]
    root: Path
    browser: Browser

    def walk(self, address: str, *wanted: str, shot: str = "") -> str:
        """Open a page, wait until it says all that is wanted, and return what it says."""
        self.browser.driver.get(address)
        return self.see(*wanted, shot=shot)

    def see(self, *wanted: str, shot: str = "") -> str:
        """Wait until the page says all that is wanted."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while missing := [text for text in wanted if text not in (said := self.text())]:
            assert time.monotonic() < deadline, f"{missing} not in: {said[:2000]}"
            time.sleep(0.5)
        if shot and (directory := os.environ.get("TELL_SCREENSHOTS")):
            time.sleep(3.0)  # animations
            taken = self.browser.command("Page.captureScreenshot", {"format": "png"})
            image = Image.open(BytesIO(b64decode(taken["data"]))).convert("RGB")
            (Path(directory) / f"{shot}.png").write_bytes(compressed(image))
        return said

    def text(self) -> str:
        """All text of the page."""
        return str(self.browser.run("return document.body ? document.body.innerText : ''"))

    def click(self, label: str) -> None:
        """Click the innermost element that shows just this text."""
        script = (
            "const found = [...document.querySelectorAll('a, button, [role=tab], li, span')]"
            ".filter(e => e.innerText && e.innerText.trim() === arguments[0]).pop();"
            "if (found) found.click(); return !!found"
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.browser.run(script, label):
            assert time.monotonic() < deadline, f"nothing to click says {label}"
            time.sleep(0.5)

    def artifact(self, key: str) -> str:
        """Address of an artifact's page."""
        (found,) = [a for a in self.servers.artifacts(self.run["id"]) if a["key"] == key]
        return f"{self.servers.prefect}/artifacts/artifact/{found['id']}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if missing := missing_parts(shutil.which):
        sentence = f"no browser to look at pages in: {missing} not found"
        if os.environ.get("TELL_REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    place = tmp_path_factory.mktemp("pages")
    world = write_tiny_world(tmp_path_factory.mktemp("pages-world"))
    spec = write_tiny_spec(
        place / "tiny.yaml",
        world,
        arms=["base", "sft", "tell"],
        seeds=[0, 1],
        budgets={"task_tokens": [200, 400, 800]},
        training={"learning_rate": 0.003, "epochs": 5},
    )
    root = place / "run"
    with platform(place / "services") as servers:
        asked = servers.run("experiment", 900, spec_file=str(spec), settings=[], out=str(root))
        assert asked["state_name"] == "Completed"
        (run,) = servers.post(
            "flow_runs/filter", {"flows": {"name": {"any_": ["experiment"]}}}
        ).json()
        browser = start_chromium(tmp_path_factory.mktemp("downloads"))
        browser.command("Network.emulateNetworkConditions", ONLINE)
        browser.resize(1400, 1000)
        yield Scene(servers, run, root, browser)
        browser.quit()


def test_the_run_page_tells_the_story_and_lists_its_artifacts(scene: Scene):
    address = f"{scene.servers.prefect}/runs/flow-run/{scene.run['id']}"
    story = ("experiment · tiny", "Completed", "kept 80 of 80 examples")
    scene.walk(address, *story, shot="prefect-run")
    scene.click("Artifacts")

    said = scene.see("answer", "plan", "scores", "leverage", shot="prefect-artifacts")

    assert "mlflow" in said.lower()


def test_each_training_says_how_fast_it_was(scene: Scene):
    (cells,) = scene.servers.post(
        "flow_runs/filter", {"flows": {"name": {"any_": ["cells"]}}}
    ).json()

    scene.walk(
        f"{scene.servers.prefect}/runs/flow-run/{cells['id']}",
        "cells · tiny",
        "tokens/s, dev loss",
        shot="prefect-cells",
    )


def test_the_plan_and_the_scores_are_tables(scene: Scene):
    scene.walk(
        scene.artifact("plan"), "tell · 400 task · 800 general · seed 0", shot="prefect-plan"
    )
    scene.walk(scene.artifact("scores"), "log_probability", "mean_score")


def test_the_leverage_figure_is_shown(scene: Scene):
    scene.walk(scene.artifact("leverage"), "task tokens", shot="prefect-leverage")

    width = "return Math.max(0, ...[...document.images].map(i => i.naturalWidth))"
    assert scene.browser.run(width) > 500


def test_the_mlflow_run_has_scores_data_and_artifacts(scene: Scene):
    record = read_json(scene.root / "tracking.json")
    address = f"{scene.servers.mlflow}/#/experiments/{record['experiment_id']}/runs"

    scene.walk(f"{address}/{record['parent']}", "tiny", "Registered models", shot="mlflow-run")
    cell = record["cells"]["tell-t400-g800-s0"]
    scene.walk(f"{address}/{cell}", "tell-t400-g800-s0", "log_probability")


def test_the_page_of_a_version_is_its_report_card(scene: Scene):
    client = MlflowClient(scene.servers.mlflow, scene.servers.mlflow)
    assert client.get_registered_model(NAME).aliases["challenger"]

    scene.walk(
        f"{scene.servers.mlflow}/#/models/{NAME}/versions/1",
        "Price in other abilities",
        "challenger",
        shot="mlflow-version",
    )


def test_our_report_opens_beside_them(scene: Scene):
    said = scene.walk((scene.root / "report.html").as_uri(), "leverage")

    assert "tiny" in said
