"""Figures of matplotlib as SVG inside a page: text stays text, colours are the page's own, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK, SOFT, LINE, BAR = "#1b1f27", "#667085", "#e2e5ea", "#3b6fd4"  # of the page's light side; see `to_svg`
# Okabe and Ito's palette, those that show on light and on dark ground.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", BAR: "var(--bar)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def figure(width: float, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """`pyplot.subplots` of `width` x `height` inches in the page's style; closed again behind the block."""
    with matplotlib.rc_context(_STYLE):
        drawn, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **options)
        try:
            yield drawn, axes
        finally:
            pyplot.close(drawn)


def to_svg(drawn: Any, name: str) -> str:
    """The figure as an `<svg>` element, the same bytes each time.

    Args:
        name: unique in the page; the element's ids begin with it.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawn.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # an element of HTML needs none
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
