"""The report of a run: one self-contained HTML file that opens offline."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tell_core.errors import StoreError
from tell_core.report import figures
from tell_core.report.blocks import Section
from tell_core.report.curves import as_series
from tell_core.report.emergence import emergence
from tell_core.report.evidence import curation, ledger, prompts, shuffle
from tell_core.report.formats import format_time
from tell_core.report.limits import limits, reproduce
from tell_core.report.outcome import (
    answer,
    describe_counts,
    draw_main,
    learning_curves,
    leverage,
    main_points,
    price,
    verdict,
)
from tell_core.report.palette import css_variables
from tell_core.report.predictions import predictions
from tell_core.report.reading import RunFiles, read_run
from tell_core.report.svg import SYSTEM_FONTS, to_png, to_standalone_svg
from tell_core.store import explain_disk_errors, write_text

MAX_BYTES = 5_000_000

_SECTIONS: tuple[Callable[[RunFiles], Section], ...] = (
    answer,
    learning_curves,
    leverage,
    price,
    emergence,
    ledger,
    curation,
    shuffle,
    prompts,
    predictions,
    limits,
    reproduce,
)


def write_report(run: Path) -> Path:
    """Draw ``report.html`` of a run directory from its files, replacing the old one in one step.

    The file holds everything it shows, needs no network and no script, and is at most 5 MB.
    A part whose files are missing becomes a sentence.

    Args:
        run: A run directory.

    Returns:
        Path of the report.

    Raises:
        InputError: ``run`` is not a run directory.
        StoreError: A file cannot be read or written, or the page would be larger than 5 MB.
    """
    page = render(read_run(run))
    size = len(page.encode())
    if size > MAX_BYTES:
        raise StoreError(
            f"the report of {run} would have {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB "
            "are allowed: split the experiment into runs with fewer cells or metrics"
        )
    write_text(run / "report.html", page)
    return run / "report.html"


def write_figures(run: Path, out_dir: Path) -> tuple[Path, ...]:
    """Write the main figure, TELL against SFT, as SVG and PNG.

    The SVG follows the reader's light or dark theme; the PNG is on light paper.

    Args:
        run: A run directory.
        out_dir: Where the figures go; made when it is missing.

    Returns:
        Paths of ``learning_curves.svg`` and ``learning_curves.png``, none without scores.

    Raises:
        InputError: ``run`` is not a run directory.
        StoreError: The directory cannot be written.
    """
    files = read_run(run)
    if not as_series(main_points(files)):
        return ()
    draw = partial(draw_main, files, size=figures.WIDE)
    svg, png = out_dir / "learning_curves.svg", out_dir / "learning_curves.png"
    write_text(svg, to_standalone_svg(draw, "main"))
    with explain_disk_errors(png):
        png.write_bytes(to_png(draw))
    return svg, png


def render(run: RunFiles) -> str:
    """Return the page of a run as HTML."""
    return page_templates().get_template("report.html.j2").render(_context(run))


def page_templates() -> Environment:
    """Return the templates; they escape everything that is not marked as our own markup."""
    return Environment(
        loader=PackageLoader("tell_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(run: RunFiles) -> dict[str, Any]:
    model = run.spec.get("model") or {}
    task = run.spec.get("task") or {}
    return {
        "name": run.name,
        "summary": verdict(run),
        "model": str(model.get("id") or ""),
        "task": str(task.get("name") or ""),
        "counts": describe_counts(run),
        "created": format_time(str(run.manifest.get("created") or "")),
        "sections": [section(run) for section in _SECTIONS],
        "light": css_variables("light"),
        "dark": css_variables("dark"),
        "fonts": SYSTEM_FONTS,
    }
