"""Charts by matplotlib: one style for all, and SVG for pages, whose text stays text and whose colours are the page's own."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mmdit_lora.files import atomic_file

# Of the page's light side; in SVG each becomes a variable of `templates/style.css`, which has a dark side too.
INK, SOFT, LINE, BAR = "#1b1f27", "#667085", "#e2e5ea", "#3b6fd4"
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", BAR: "var(--bar)"}
# Okabe and Ito's palette, distinct with every common colour blindness: those that show on light and on dark ground.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c")
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a phrase may hold dollars
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def figure(
    width: float, height: float, *, mosaic: list[Any] | None = None, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure of `width` x `height` inches in the common style, and its axes, by `Figure.subplots(**options)`, or
    `Figure.subplot_mosaic(mosaic)`."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has more fonts
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn, drawn.subplot_mosaic(mosaic) if mosaic else drawn.subplots(**options)


def save(drawn: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    with atomic_file(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=110)


def to_svg(drawn: Figure, name: str) -> Markup:
    """The figure as an `<svg>` element, the same bytes each time.

    Args:
        name: unique in the page; ids are made from it.
    """
    for artist in drawn.findobj():
        artist.set_clip_on(False)
    file, none = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawn.savefig(file, format="svg", transparent=True, metadata=none)
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<g id=") :])  # ids of groups come again in each figure
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    width, height = drawn.get_size_inches()
    return Markup(
        f'<svg viewBox="0 0 {72 * width:g} {72 * height:g}" style="max-width:{115 * width:.0f}px" role="img">{text.strip()}'
    )


def columns(counts: Mapping[str, int], name: str) -> Markup:
    """Vertical bars, one a key, in the order given; nothing for no counts."""
    if not counts:
        return Markup()
    many = len(counts) > 14
    with figure(4, 2) as (drawn, axes):
        bars = axes.bar(range(len(counts)), list(counts.values()), color=BAR, width=0.84)
        shown = [str(count) if count else "" for count in counts.values()]
        axes.bar_label(bars, shown, padding=2, fontsize=6 if many else 7.5, color=SOFT, rotation=90 if many else 0)
        every = math.ceil(len(counts) / 8)  # labels that find room
        axes.set_xticks(range(0, len(counts), every), list(counts)[::every])
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        return to_svg(drawn, name)


def rows(counts: Mapping[str, int], name: str, *, limit: int = 12) -> Markup:
    """Horizontal bars with their names, the first `limit`; below them how many more there are."""
    if not counts:
        return Markup()
    names, more = list(counts)[:limit], len(counts) - limit
    with figure(4, 0.22 * (len(names) + (more > 0)) + 0.1) as (drawn, axes):
        bars = axes.barh(range(len(names)), [counts[each] for each in names], color=BAR, height=0.66)
        axes.bar_label(bars, padding=4, fontsize=8, color=SOFT)
        labels = [each if len(each) <= 32 else each[:31] + "…" for each in names]
        labels += [f"and {more} more"] if more > 0 else []
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.margins(x=0.15)
        axes.spines[:].set_visible(False)
        return to_svg(drawn, name)


def heat(points: Sequence[tuple[float, float]], name: str, *, cells: int = 12) -> Markup:
    """Where points, (x, y) in [0, 1] with y downwards, lie: darker is more."""
    if not points:
        return Markup()
    x, y = np.array(points).T
    counts, *_ = np.histogram2d(y, x, bins=cells, range=((0, 1), (0, 1)))
    colors = np.zeros((cells, cells, 4))
    colors[..., :3], colors[..., 3] = to_rgb(BAR), counts / max(counts.max(), 1)
    with figure(4, 2) as (drawn, axes):
        axes.imshow(colors, interpolation="nearest")
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=LINE)
        return to_svg(drawn, name)
