"""The report of a run: one HTML file that opens offline, and its figures as files."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tell_core.errors import StoreError
from tell_core.report.answer import answer, describe_counts, verdict
from tell_core.report.blocks import Chart, Section, charts_of, missing
from tell_core.report.carried import carried_json
from tell_core.report.emergence import emergence
from tell_core.report.evidence import curation, ledger, prompts, shuffle
from tell_core.report.exports import write_figure_files
from tell_core.report.forecast import forecast
from tell_core.report.formats import format_time
from tell_core.report.learning import learning_curves
from tell_core.report.leverage import leverage
from tell_core.report.limits import limits, reproduce
from tell_core.report.palette import MARKER_PATHS, css_variables
from tell_core.report.predictions import item_bytes, predictions
from tell_core.report.predictions_table import mechanism
from tell_core.report.price import price
from tell_core.report.reading import RunFiles, read_run
from tell_core.report.scaling import scaling
from tell_core.report.svg import SYSTEM_FONTS
from tell_core.report.uncertainty import uncertainty
from tell_core.store import write_text

MAX_BYTES = 5_000_000
FIGURES_DIRECTORY = "figures"
_MARGIN_BYTES = 2_000  # for the sentence that says what was left out

_SECTIONS: tuple[Callable[[RunFiles], Section], ...] = (
    answer,
    learning_curves,
    leverage,
    forecast,
    price,
    uncertainty,
    predictions,
    emergence,
    mechanism,
    scaling,
    ledger,
    curation,
    shuffle,
    prompts,
    limits,
    reproduce,
)
_LEFT_OUT_FIRST = (
    emergence,
    scaling,
    mechanism,
    predictions,
    prompts,
    curation,
    shuffle,
    ledger,
    uncertainty,
)
_LEFT_OUT = (
    "Left out, for with it this page would be larger than 5 MB. Its figures are in figures/ of the"
    " run directory, its numbers in the files beside."
)


def write_report(run: Path) -> Path:
    """Draw ``report.html`` and ``figures/`` of a run directory from its files, replacing old ones.

    The page holds everything it shows, needs no network, and is at most 5 MB; where it would be
    larger, single items are left out, and counted, then whole chapters of details. Without scripts
    it shows all but the browsing of items and the downloads. ``figures/`` holds every figure as
    SVG, PNG and CSV. A part whose files are missing becomes a sentence.

    Args:
        run: A run directory.

    Returns:
        Path of the report.

    Raises:
        InputError: ``run`` is not a run directory.
        StoreError: A file cannot be read or written, or the page would be larger than 5 MB even
            without details.
    """
    found = read_run(run)
    sections = [section(found) for section in _SECTIONS]
    page = _page(found, sections)
    if (surplus := len(page.encode()) - MAX_BYTES) > 0:
        place = _SECTIONS.index(predictions)
        sections[place] = predictions(found, item_bytes(sections[place]) - surplus - _MARGIN_BYTES)
        page = _page(found, sections)
    charts = _all_charts(sections)
    for part in _LEFT_OUT_FIRST:
        if len(page.encode()) > MAX_BYTES:
            place = _SECTIONS.index(part)
            sections[place] = replace(sections[place], blocks=(missing(_LEFT_OUT),))
            page = _page(found, sections)
    _check_size(run, len(page.encode()))
    write_text(run / "report.html", page)
    write_figure_files(charts, run / FIGURES_DIRECTORY)
    return run / "report.html"


def page_templates() -> Environment:
    """Return the templates; they escape everything that is not marked as our own markup."""
    environment = Environment(
        loader=PackageLoader("tell_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["marker_paths"] = MARKER_PATHS
    environment.filters["carried_json"] = carried_json
    return environment


def page_script(name: str = "report") -> str:
    """Return the one script of a page: what makes elements, then what is the page's own."""
    templates = files("tell_core.report") / "templates"
    return "".join(
        (templates / f"{part}.js").read_text(encoding="utf-8") for part in ("elements", name)
    )


def _page(run: RunFiles, sections: Sequence[Section]) -> str:
    return page_templates().get_template("report.html.j2").render(_context(run, sections))


def _model_words(model: str) -> str:
    """Return the name of a model on a hub, of one on disk its last two directories."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _check_size(run: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise StoreError(
            f"the report of {run} would have {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB "
            "are allowed: split the experiment into runs with fewer cells or metrics"
        )


def _all_charts(sections: Sequence[Section]) -> list[Chart]:
    return [chart for section in sections for chart in charts_of(section.blocks)]


def _context(run: RunFiles, sections: Sequence[Section]) -> dict[str, Any]:
    model = run.spec.get("model") or {}
    task = run.spec.get("task") or {}
    script = page_script()
    charts = _all_charts(sections)
    carried = {
        "figures": {chart.name: chart.data.to_csv() for chart in charts},
        "legends": {chart.name: [key.label for key in chart.legend] for chart in charts},
        "light": css_variables("light"),
        "dark": css_variables("dark"),
        "fonts": SYSTEM_FONTS,
    }
    return {
        "name": run.name,
        "summary": verdict(run),
        "model": _model_words(str(model.get("id") or "")),
        "task": str(task.get("name") or ""),
        "counts": describe_counts(run),
        "created": format_time(str(run.manifest.get("created") or "")),
        "sections": sections,
        "light": css_variables("light"),
        "dark": css_variables("dark"),
        "fonts": SYSTEM_FONTS,
        "carried": carried,
        "script": Markup(script),
        "script_digest": b64encode(sha256(script.encode()).digest()).decode(),
    }
