"""A real browser and real reports to open in it; skipped, with the reason, where there is none.

With TELL_REQUIRE_BROWSER=1 a missing browser is a failure: so CI cannot skip these tests unseen.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from tell_core.report import charts, page, write_report
from tell_core.report.blocks import Chart
from tell_core.report.exports import write_figure_files
from tests.browser.chromium import Browser, missing_parts, start_chromium
from tests.tell_core.report.conftest import RunPlan, write_run

HOSTILE = (
    "</script><script>window.hacked = 1</script><!--<script>"
    '<img src="x" onerror="window.hacked = 2"><svg onload="window.hacked = 3">'
    "\u2028window.hacked = 4\u2029'\"`${window.hacked = 5}&lt;b&gt;"
)
SAVED_FIGURES = ("learning_curves", "forecast-log_probability-tell-g240000")
_SMALL: dict[str, Any] = {
    "seeds": (0, 1), "general_budgets": (240_000,), "task_budgets": (1_000, 16_000, 64_000),
}  # fmt: skip


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One headless Chromium for all tests, without network."""
    if missing := missing_parts(shutil.which):
        sentence = f"no browser to test the report in: {missing} not found"
        if os.environ.get("TELL_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{sentence} (TELL_REQUIRE_BROWSER is 1)")
        pytest.skip(sentence)
    browser = start_chromium(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser as a laptop in light mode; at the end there must be no error on its console."""
    chromium.reset()
    yield chromium
    assert chromium.console_errors() == []


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its report and the files of the figures that tests save."""

    def write_saved(drawn: Iterable[Chart], out_dir: Path) -> None:
        write_figure_files([chart for chart in drawn if chart.name in SAVED_FIGURES], out_dir)

    run = write_run(tmp_path_factory.mktemp("browser") / "copy-task", RunPlan(**_SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_figure_files", write_saved)
        write_report(run)
    return run


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts, answers and names try to run as code; its figures are not drawn."""
    plan = RunPlan(**_SMALL, hostile=HOSTILE)
    run = write_run(tmp_path_factory.mktemp("hostile") / "copy-task", plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "to_svg", lambda draw, name: Markup("<svg></svg>"))
        patch.setattr(page, "write_figure_files", lambda charts, out_dir: None)
        write_report(run)
    return run
