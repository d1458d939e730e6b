"""The sheet of `attribute`: a row for each box, its change and its attention as heat over the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import matplotlib
import numpy as np
from PIL import Image

from mmdit_lora.analysis.attribution import Attribution, BoxAttribution
from mmdit_lora.evaluate.canvas import INK, Rgb, blank, fit, framed, paragraph, side_by_side, stack
from mmdit_lora.evaluate.draw import GREY, draw_boxes, phrase_colors
from mmdit_lora.layout import Layout

_CELL, _GAP, _GUTTER = 256, 18, 210
_HEADS = (
    "all boxes",
    "without this box, same noise",
    "what changed: heat over the picture, lightest = most",
    "attention of the picture to this box, lightest = most",
)


def sheet(found: Attribution, colors: Mapping[str, Rgb] | None = None) -> Image.Image:
    """One RGB figure, about 1400 px wide.

    Args:
        colors: of phrases, from `phrase_colors` of all layouts that get a sheet; None = of this one's.
    """
    colors = colors or phrase_colors([found.layout])
    rows = [side_by_side([blank(_GUTTER, 1), *(paragraph(head, _CELL, 15, GREY) for head in _HEADS)], gap=_GAP)]
    for index, box in enumerate(found.boxes):
        alone = replace(found.layout, boxes=(found.layout.boxes[index],))
        cells = [
            _boxed(fit(found.picture, _CELL), found.layout, colors),
            _boxed(fit(found.without[index], _CELL), alone, colors),
            _boxed(heat(found.picture, found.changes[index]), alone, colors),
            _boxed(heat(found.picture, found.attentions[index]), alone, colors),
        ]
        rows += [blank(1, 10), side_by_side([_label(box), *cells], gap=_GAP)]
    width = max(row.width for row in rows)
    title = paragraph(found.layout.caption, width, 24, INK, max_lines=2)
    return framed(stack([title, blank(1, 14), *rows]), 28)


def heat(picture: Image.Image, amounts: np.ndarray) -> Image.Image:
    """(rows, columns) amounts, the largest lightest, over the picture in grey."""
    ground = np.asarray(fit(picture, _CELL).convert("L").convert("RGB"), dtype=np.float64) / 255
    share = amounts / amounts.max() if amounts.max() > 0 else amounts
    scaled = Image.fromarray(share.astype(np.float32)).resize(
        (ground.shape[1], ground.shape[0]), Image.Resampling.NEAREST
    )
    level = np.asarray(scaled, dtype=np.float64)
    colors = matplotlib.colormaps["GnBu_r"](level)[..., :3]
    mixed = 0.25 * ground + 0.75 * colors
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def _boxed(image: Image.Image, layout: Layout, colors: Mapping[str, Rgb]) -> Image.Image:
    return draw_boxes(image, layout, scale_to=1, labels=False, colors=colors)


def _label(box: BoxAttribution) -> Image.Image:
    lines = [
        paragraph(box.phrase, _GUTTER, 19, INK, max_lines=3),
        paragraph(f"{box.area:.0%} of the picture", _GUTTER, 14, GREY, top=4),
        paragraph(f"change: {_share(box.change_inside, box.change_lift)}", _GUTTER, 15, INK, top=12),
        paragraph(f"attention: {_share(box.attention_inside, box.attention_lift)}", _GUTTER, 15, INK, top=6),
    ]
    return stack(lines, width=_GUTTER)


def _share(inside: float | None, lift: float | None) -> str:
    return "none" if inside is None else f"{inside:.0%} of it inside, {lift:.1f} times its area"
