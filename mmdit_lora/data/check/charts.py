"""Histograms as inline SVG, and images with their boxes drawn as data URLs: what a page needs without a network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image, ImageDraw

from mmdit_lora.data.check.findings import Example
from mmdit_lora.data.images import load_image, opened
from mmdit_lora.errors import InputError

_WIDTH, _HEIGHT, _FOOT = 320, 150, 18
_THUMB = 320  # long side of a thumbnail in pixels
_AT_FAULT, _OTHER, _BEYOND = (230, 30, 60), (40, 115, 245), (120, 126, 138)
_MAX_PIXELS = 60_000_000  # larger ones are not decoded a second time for a page


def columns(counts: Mapping[str, int]) -> str:
    """Vertical bars, one a key, in the order given; the value in each bar's tooltip."""
    if not counts:
        return ""
    top, wide = max(max(counts.values()), 1), _WIDTH / len(counts)
    every = math.ceil(len(counts) / 8)  # labels that find room
    bars = []
    for n, (name, count) in enumerate(counts.items()):
        tall = (_HEIGHT - _FOOT - 14) * count / top
        x, y = n * wide, _HEIGHT - _FOOT - tall
        bars.append(
            f'<rect x="{x + wide * 0.08:.1f}" y="{y:.1f}" width="{wide * 0.84:.1f}" height="{tall:.1f}" rx="1.5">'
            f"<title>{escape(name)}: {count}</title></rect>"
        )
        if n % every == 0:
            bars.append(f'<text x="{x + wide / 2:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(name)}</text>')
        if count == top:
            bars.append(f'<text x="{x + wide / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count}</text>')
    line = f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT - _FOOT}" y2="{_HEIGHT - _FOOT}"/>'
    return f'<svg viewBox="-12 0 {_WIDTH + 24} {_HEIGHT}" role="img">{line}{"".join(bars)}</svg>'


def rows(counts: Mapping[str, int], *, shown: int = 12) -> str:
    """Horizontal bars with their names, the first `shown`; the rest is summed up."""
    items = [(name, count) for name, count in counts.items()][:shown]
    if not items:
        return ""
    top = max(count for _, count in items)
    lines = []
    for n, (name, count) in enumerate(items):
        y, long = n * 20, max(1.5, 120 * count / top)
        short = name if len(name) <= 24 else name[:23] + "…"
        lines.append(
            f'<text x="150" y="{y + 13}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>'
            f'<rect x="156" y="{y + 3}" width="{long:.1f}" height="13" rx="1.5"/>'
            f'<text x="{162 + long:.1f}" y="{y + 13}">{count}</text>'
        )
    tall = len(items) * 20
    if len(counts) > shown:
        lines.append(f'<text x="150" y="{tall + 13}" text-anchor="end">and {len(counts) - shown} more</text>')
        tall += 20
    return f'<svg viewBox="0 0 {_WIDTH} {tall}" role="img">{"".join(lines)}</svg>'


def heat(centers: Sequence[tuple[float, float]], *, cells: int = 12) -> str:
    """Where the centers of boxes, (x, y) in [0, 1], lie in their images: darker is more."""
    if not centers:
        return ""
    counts: dict[tuple[int, int], int] = {}
    for x, y in centers:
        cell = (min(int(x * cells), cells - 1), min(int(y * cells), cells - 1))
        counts[cell] = counts.get(cell, 0) + 1
    top, side = max(counts.values()), _HEIGHT / cells
    squares = "".join(
        f'<rect x="{column * side:.1f}" y="{row * side:.1f}" width="{side:.1f}" height="{side:.1f}" '
        f'opacity="{count / top:.2f}"><title>{count}</title></rect>'
        for (column, row), count in sorted(counts.items())
    )
    frame = f'<rect class="frame" x="0" y="0" width="{_HEIGHT}" height="{_HEIGHT}"/>'
    return f'<svg viewBox="-85 -1 {_WIDTH} {_HEIGHT + 2}" role="img">{squares}{frame}</svg>'


def by_powers(values: Sequence[float]) -> dict[str, int]:
    """Counts of values in (0, 1] by halves: from 1/1024 and less up to more than 1/2, as percentages."""
    edges = [2.0**-power for power in range(10, -1, -1)]
    names = [f"{edge:.0%}" if edge >= 0.01 else f"{edge:.1%}" for edge in edges]
    counts = dict.fromkeys(names, 0)
    for value in values:
        counts[next((name for edge, name in zip(edges, names, strict=True) if value <= edge), names[-1])] += 1
    return counts


def thumbnail(example: Example) -> str | None:
    """A data URL of the example's image with its boxes; None where it cannot be shown."""
    if example.image is None:
        return None
    try:
        source = example.image if example.record is None else example.record.source()
        with opened(source) as head:
            if head.width * head.height > _MAX_PIXELS:
                return None
        image = load_image(source)
    except InputError:
        return None
    scale = _THUMB / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    image, frame = _with_margin(image, example.at_fault)
    draw = ImageDraw.Draw(image)
    for boxes, color, width in ((example.others, _OTHER, 1), (example.at_fault, _AT_FAULT, 3)):
        for box in boxes:
            _rectangle(draw, box, frame, color, width)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _with_margin(
    image: Image.Image, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """On a canvas that shows boxes beyond the image, up to half a side; and (left, top, width, height) of the image."""
    xs, ys = [v for box in boxes for v in box[0::2]], [v for box in boxes for v in box[1::2]]
    left, right = (round(min(max(v, 0), 0.5) * image.width) for v in (-min(xs, default=0), max(xs, default=1) - 1))
    top, bottom = (round(min(max(v, 0), 0.5) * image.height) for v in (-min(ys, default=0), max(ys, default=1) - 1))
    canvas = Image.new("RGB", (left + image.width + right, top + image.height + bottom), _BEYOND)
    canvas.paste(image, (left, top))
    return canvas, (left, top, image.width, image.height)


def _rectangle(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    frame: tuple[int, int, int, int],
    color: tuple[int, int, int],
    width: int,
) -> None:
    """Any corners, in any order; those beyond the margin are drawn at its edge, so that they are seen."""
    left, top, wide, high = frame
    xs = sorted(left + min(max(v, -0.5), 1.5) * (wide - 1) for v in box[0::2])
    ys = sorted(top + min(max(v, -0.5), 1.5) * (high - 1) for v in box[1::2])
    if width > 1:  # a light line around, to be seen on any ground
        draw.rectangle((xs[0] - 1, ys[0] - 1, xs[1] + 1, ys[1] + 1), outline=(255, 255, 255), width=width + 2)
    draw.rectangle((xs[0], ys[0], xs[1], ys[1]), outline=color, width=width)
