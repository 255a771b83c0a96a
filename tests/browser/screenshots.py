"""Screenshots of a report for the documentation, from a real browser.

    python -m tests.browser.screenshots runs/demo/report.html docs/figures

writes report-answer.png (laptop), report-forecast.png (laptop, dark), report-items.png (laptop),
and report-phone.png, each about 250 kB at most.
"""

import argparse
import io
import sys
import tempfile
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.browser.chromium import Browser, start_chromium

MAX_BYTES = 250_000


@dataclass(frozen=True)
class Shot:
    """One screenshot: the section it begins at, the window in CSS pixels, the theme."""

    name: str
    section: str
    width: int
    height: int
    theme: str = "light"


SHOTS = (
    Shot("report-answer", "", 1400, 1180),
    Shot("report-forecast", "forecast", 1400, 1180, "dark"),
    Shot("report-items", "predictions", 1400, 1180),
    Shot("report-phone", "", 390, 1180),
)


def take(browser: Browser, report: Path, shot: Shot) -> bytes:
    """Return a screenshot as PNG, with fewer colours where MAX_BYTES asks for it."""
    browser.resize(shot.width, shot.height, is_phone=shot.width < 640)
    browser.use_theme(shot.theme)
    browser.open(report)
    if shot.section:
        script = "document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})"
        browser.run(script, shot.section)
    image = b64decode(browser.command("Page.captureScreenshot", {"format": "png"})["data"])
    return compressed(Image.open(io.BytesIO(image)).convert("RGB"))


def main(arguments: list[str]) -> int:
    """Write every screenshot of a report into a directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("out", type=Path, help="directory of the screenshots")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        browser = start_chromium(Path(downloads))
        try:
            for shot in SHOTS:
                path = options.out / f"{shot.name}.png"
                path.write_bytes(take(browser, options.report.resolve(), shot))
                print(f"{path}: {path.stat().st_size:,} bytes")
        finally:
            browser.quit()
    return 0


def compressed(image: Image.Image) -> bytes:
    """PNG of an image, with fewer colours where MAX_BYTES asks for it."""
    for colours in (None, 256, 128, 64):
        shown = image if colours is None else image.quantize(colours)
        buffer = io.BytesIO()
        shown.save(buffer, format="PNG", optimize=True)
        if buffer.tell() < MAX_BYTES:
            break
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
