"""Headless Chromium for the tests and the screenshots of the report: offline, one window."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
_OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


def missing_parts(which: Callable[[str], str | None]) -> str:
    """Name what is needed and not there: selenium, Chromium, its driver; empty when all is."""
    missing = []
    try:
        import selenium  # noqa: F401
    except ImportError:
        missing.append("the Python package selenium")
    if not any(map(which, BINARIES)):
        missing.append("Chromium")
    if not which("chromedriver"):
        missing.append("chromedriver")
    return " and ".join(missing)


def start_chromium(downloads: Path) -> "Browser":
    """Start a browser that saves downloads in a directory and has no network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for name in BINARIES if (path := shutil.which(name)))
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    return Browser(driver, downloads)


class Browser:
    """A window with the few things that tests of the report need."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads
        behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
        self.command("Browser.setDownloadBehavior", behaviour)
        self.command("Network.enable", {})
        self.command("Network.emulateNetworkConditions", _OFFLINE)

    def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def reset(self) -> None:
        """Return to a laptop in light mode with scripts, and forget the console."""
        self.driver.get("about:blank")
        self.resize(1400, 1000)
        self.use_theme("light")
        self.allow_scripts(True)
        self.console_errors()

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """Set the size of the page in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.command("Emulation.setDeviceMetricsOverride", metrics)

    def use_theme(self, theme: str) -> None:
        """Prefer light or dark colours."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})

    def allow_scripts(self, are_allowed: bool) -> None:
        """Let scripts of the page run or not."""
        self.command("Emulation.setScriptExecutionDisabled", {"value": not are_allowed})

    def open(self, report: Path) -> None:
        """Open a report from disk."""
        self.driver.get(report.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element that fits."""
        return list(
            self.run(
                "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)",
                selector,
            )
        )

    def find(self, selector: str) -> Any:
        """Return the first element that fits."""
        return self.driver.find_element("css selector", selector)

    def choose(self, control: str, value: str) -> None:
        """Choose an option of one of the item browser's controls, as a reader does."""
        from selenium.webdriver.support.select import Select

        Select(self.find(f"[data-control={control}]")).select_by_value(value)

    def save(self, figure: str, file_format: str, patience_seconds: float = 10.0) -> bytes:
        """Press a figure's button and return the file that was saved."""
        path = self.downloads / f"{figure}.{file_format}"
        path.unlink(missing_ok=True)
        button = self.find(f'[data-figure="{figure}"] [data-format={file_format}]')
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
        button.click()
        deadline = time.monotonic() + patience_seconds
        while not (path.is_file() and path.stat().st_size):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path.name} was not saved in {patience_seconds} s")
            time.sleep(0.02)
        return path.read_bytes()

    def console_errors(self) -> list[str]:
        """Return what the console has of errors and warnings since the last call."""
        entries = self.driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def quit(self) -> None:
        """End the browser."""
        self.driver.quit()
