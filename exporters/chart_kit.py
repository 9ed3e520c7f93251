"""What every chart of the report is drawn with: colours of the page, an empty figure, and SVG that lives in HTML.

The SVG takes its colours and its font from the page's CSS variables, so it follows the light or dark scheme, and it is
drawn once for wide screens and once for phones, so that its text has the size of the page's text on both.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

__all__ = [
    "BOUND",
    "DENSE",
    "INK",
    "LINE",
    "MUTED",
    "NARROW",
    "SERIES",
    "SLIM",
    "TIMES",
    "WIDE",
    "Chart",
    "bare",
    "empty_figure",
    "finite",
    "label_right",
    "make_chart",
    "set_title",
    "short",
]

TIMES = "\N{MULTIPLICATION SIGN}"
"""How a ratio ends, as in 1.25 times."""

WIDE, NARROW = 720, 340
"""Widths of the two drawings in CSS pixels."""

INK, MUTED, LINE, SLIM, DENSE, BOUND = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
SERIES = tuple(f"#01030{index}" for index in range(8))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    SLIM: "var(--accent)",
    DENSE: "var(--dense)",
    BOUND: "var(--bound)",
    **{sentinel: f"var(--s{index})" for index, sentinel in enumerate(SERIES)},
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fxprune",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "patch.linewidth": 1,
}


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        wide: SVG for wide screens; trusted markup.
        narrow: SVG for phones; trusted markup.
        alt: what it shows, in words.
    """

    wide: str
    narrow: str
    alt: str


def make_chart(name: str, alt: str, draw: Callable[[int], Figure]) -> Chart:
    """Draw a figure for both widths.

    Args:
        name: for the ids inside the SVG, which must be alone on a page.
        alt: what it shows, in words.
        draw: from the width in CSS pixels to the figure.
    """
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Names may have glyphs that the measuring font lacks; the reader's browser draws the text with its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        wide, narrow = (_svg(draw(width), f"{name}-{width}", alt) for width in (WIDE, NARROW))
    return Chart(wide, narrow, alt)


def empty_figure(width: int, height: float) -> Figure:
    """An empty figure measured in CSS pixels: the SVG backend writes one unit per 1/72 inch."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    figure.set_layout_engine("constrained", w_pad=2 / 72, h_pad=7 / 72)
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Figure, prefix: str, alt: str) -> str:
    """Render a figure as one `<svg>` element: no document parts, no namespaces, page colours, ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ET.fromstring(buffer.getvalue())  # noqa: S314 - it was written two lines above
    drawn = ET.Element("svg", {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt})
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.rpartition("}")[2], _attribute(key.rpartition("}")[2], value, prefix))
    # A style sheet in the drawing would hold for the whole page; the page's own sets the line joins of charts.
    drawn.extend(child for child in root if child.tag != "metadata" and child.find("style") is None)
    return ET.tostring(drawn, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return value.replace("#", f"#{prefix}-", 1)
    value = value.replace("url(#", f"url(#{prefix}-")
    value = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;]*", r"font: \1\2 var(--font)", value)
    for sentinel, variable in _VARIABLES.items():
        value = value.replace(sentinel, variable)
    return value


def bare(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Take away what says nothing, and draw grid lines across one axis."""
    axes.set_facecolor("none")
    axes.grid(visible=True, axis=grid)
    axes.spines["left"].set_visible(False)
    if grid == "x":
        axes.spines["bottom"].set_visible(False)


def set_title(axes: Axes, text: str, width: int) -> None:
    """Title a panel, cut to what fits."""
    axes.set_title(short(text, width // 8), loc="left", fontsize=12, color=INK, parse_math=False)


def label_right(axes: Axes, text: str, x: float, y: float, *, gap: int = 7, weight: str = "normal") -> None:
    """Write a figure `gap` pixels to the right of a point."""
    axes.annotate(text, (x, y), (gap, 0), textcoords="offset points", va="center", weight=weight, parse_math=False)


def short(text: str, length: int) -> str:
    """Text on one line, cut to a length."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def finite(value: float | None) -> bool:
    """Whether there is a value that an axis can show."""
    return value is not None and math.isfinite(value)
