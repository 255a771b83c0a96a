"""Turn a drawing into SVG that follows the page's theme, or into PNG.

Text stays text and the background is transparent. A drawing is made with stand-in colours, and
these become CSS variables: the same SVG reads on a light and on a dark page.
"""

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tell_core.report.palette import LIGHT, SENTINELS, Palette, css_variables

SYSTEM_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_SURPLUS = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|<style type=\"text/css\">.*?</style>", re.DOTALL
)

_EDGE_PIXELS = 2.0  # between the y-label and the edge of the figure

Draw = Callable[[Palette], Figure]


def drawing_settings(salt: str = "tell") -> AbstractContextManager[None]:
    """Settings under which everything is drawn; ``salt`` makes ids equal from run to run."""
    return mpl.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9.0,
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "text.parse_math": False,
            "axes.unicode_minus": True,
        }
    )


def to_svg(draw: Draw, name: str) -> Markup:
    """Draw with CSS variables as colours and return SVG to put into a page.

    Text in the drawing is escaped by matplotlib.

    Args:
        draw: Draws the figure with the palette it is given.
        name: Prefix of the ids inside, so that several drawings share one page.
    """
    svg = _fit_for_page(_save_svg(draw(SENTINELS), name), name)
    for colour, sentinel in SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{colour})")
    return Markup(svg)


def to_standalone_svg(draw: Draw, name: str, alt: str = "") -> str:
    """Return an SVG file of its own, on paper, that follows the reader's light or dark theme.

    Args:
        draw: Draws the figure.
        name: Prefix of the ids inside.
        alt: Text alternative, kept in the file.
    """
    style = (
        f"<style>:root{{{css_variables('light')} --sans: {SYSTEM_FONTS};}}"
        f"@media (prefers-color-scheme: dark){{:root{{{css_variables('dark')}}}}}</style>"
    )
    head, rest = str(to_svg(draw, name)).split(">", 1)
    title = f"<title>{escape(alt)}</title>" if alt else ""
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head} {_NAMESPACES}>{title}{style}{paper}{rest}"


def to_png(draw: Draw, *, dots_per_inch: int = 160) -> bytes:
    """Return the figure as PNG on light paper."""
    buffer = io.BytesIO()
    figure = draw(LIGHT)
    with drawing_settings():
        keep_label_inside(figure)
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor=LIGHT["paper"])
    return buffer.getvalue()


def keep_label_inside(figure: Figure) -> None:
    """Begin a lone plot further right where wide numbers push its y-label out of the figure."""
    if len(figure.axes) != 1:
        return
    (axes,) = figure.axes
    canvas: Any = FigureCanvasAgg(figure)
    box = axes.yaxis.get_tightbbox(canvas.get_renderer())
    missing = (_EDGE_PIXELS - box.x0) / figure.bbox.width if box is not None else 0.0
    if missing > 0:
        place = axes.get_position(original=True)
        axes.set_position((place.x0 + missing, place.y0, place.width - missing, place.height))


def _save_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with drawing_settings(name):
        keep_label_inside(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _fit_for_page(svg: str, name: str) -> str:
    """Drop prolog, metadata and fixed size; make ids unique; take the page's font."""
    view_box = re.search(r'viewBox="[^"]*"', svg)
    body = _SURPLUS.sub("", svg[svg.index("<svg ") :]).split(">", 1)[1]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'\b(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = body.replace("url(#", f"url(#{name}-").replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
    body = re.sub(r"font: ([^'\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans)", body)
    return f"<svg {view_box[0] if view_box else ''}>" + re.sub(r"\n\s*", "\n", body)
