"""What figures are made of: text that is measured and wrapped, images that are fitted, stacked and set in rows.

All sizes are in pixels. Everything is drawn on white.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)
INK: Rgb = (28, 32, 38)
HALO: Rgb = (20, 22, 26)
TINY = 128  # images up to this side are enlarged by whole numbers without smoothing, so that one sees their pixels
_FALLBACK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
)


class Entry(NamedTuple):
    """One line of a legend: a swatch of `color` with `mark` in it, `text`, and `tail`, which is never cut."""

    color: Rgb
    text: str
    mark: str = ""
    tail: str = ""


def enlarge(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB") if max(image.size) >= side else fit(image, side)


def fit(image: Image.Image, side: int) -> Image.Image:
    """RGB, the longer side `side`; a tiny image by the largest whole number that fits, its pixels kept square."""
    image, longest = image.convert("RGB"), max(image.size)
    if longest <= min(TINY, side):
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    return image.resize(size, Image.Resampling.LANCZOS)


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), WHITE)


def stack(parts: Sequence[Image.Image], *, align: str = "left", width: int = 0, height: int = 0) -> Image.Image:
    """`parts` below one another on white, at least `width` x `height`; centred both ways with align="centre"."""
    total = sum(part.height for part in parts)
    canvas = blank(max(width, *(part.width for part in parts)), max(height, total))
    y = (canvas.height - total) // 2 if align == "centre" else 0
    for part in parts:
        canvas.paste(part, ((canvas.width - part.width) // 2 if align == "centre" else 0, y))
        y += part.height
    return canvas


def side_by_side(cells: Sequence[Image.Image], *, gap: int, first_gap: int | None = None) -> Image.Image:
    """`cells` side by side on white, aligned at the top; `first_gap` stands after the first one instead of `gap`."""
    gaps = [gap if first_gap is None else first_gap, *[gap] * len(cells)][: len(cells) - 1]
    canvas = blank(sum(cell.width for cell in cells) + sum(gaps), max(cell.height for cell in cells))
    x = 0
    for cell, space in zip(cells, [*gaps, 0], strict=True):
        canvas.paste(cell, (x, 0))
        x += cell.width + space
    return canvas


def framed(image: Image.Image, margin: int) -> Image.Image:
    canvas = blank(image.width + 2 * margin, image.height + 2 * margin)
    canvas.paste(image, (margin, margin))
    return canvas


@lru_cache(maxsize=64)
def _load_font(size: int, latin: bool) -> Any:
    if not latin:  # Pillow's own font knows ASCII and little more
        for name in _FALLBACK_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size=size)


def font(size: int, text: str = "") -> Any:
    return _load_font(size, text.replace("…", "").isascii())


def text_width(text: str, size: int) -> int:
    return math.ceil(font(size, text).getlength(text))


def line_height(size: int) -> int:
    return round(size * 1.25)


def two_digits(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "n/a"


def one_line(text: str) -> str:
    return " ".join(text.split())


def shorten(text: str, size: int, width: int) -> str:
    """`text`, or as much of its beginning as fits into `width`, and an ellipsis."""
    if len(text) <= 4 * width and text_width(text, size) <= width:
        return text
    fits = bisect_right(
        range(min(len(text), 4 * width) + 1), width, key=lambda n: text_width(text[:n].rstrip() + "…", size)
    )
    return text[: max(fits - 1, 0)].rstrip() + "…"


def wrap(text: str, size: int, width: int, max_lines: int = 99) -> list[str]:
    """Lines of at most `width` where words allow; what goes beyond `max_lines` becomes an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if len(lines) > max_lines:
            break  # what is cut anyway may be very long
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
        return [shorten(line, size, width) for line in lines]
    return lines


def block_width(lines: Sequence[str], size: int) -> int:
    return max((text_width(line, size) for line in lines), default=0)


def paragraph(
    text: str, width: int, size: int, color: Rgb, *, max_lines: int = 99, centre: bool = False, top: int = 0
) -> Image.Image:
    """`text` wrapped on white, `width` wide, `top` pixels of space above."""
    lines = [shorten(line, size, width) for line in wrap(one_line(text), size, width, max_lines)]
    canvas = blank(width, top + len(lines) * line_height(size))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        x = (width - text_width(line, size)) // 2 if centre else 0
        draw.text((x, top + number * line_height(size)), line, color, font(size, line))
    return canvas


def largest_text(text: str, room: tuple[int, int], sizes: range) -> tuple[int, list[str]]:
    """The first of the font `sizes` at which `text` fits into `room` (width, height), and its lines; or 0."""
    for size in sizes:
        block = wrap(text, size, room[0])
        if block_width(block, size) <= room[0] and len(block) * line_height(size) <= room[1]:
            return size, block
    return 0, []


def text_masks(block: Sequence[str], size: int) -> tuple[Image.Image, Image.Image]:
    """Masks of centred lines and of the rim around their letters, both as large as the text."""
    shape = (block_width(block, size), len(block) * line_height(size))
    masks = Image.new("L", shape, 0), Image.new("L", shape, 0)
    for mask, stroke in zip(masks, (0, 2), strict=True):
        for number, line in enumerate(block):
            spot = ((shape[0] - text_width(line, size)) // 2, number * line_height(size))
            ImageDraw.Draw(mask).text(spot, line, 255, font(size, line), stroke_width=stroke)
    return masks


def legend(entries: Sequence[Entry], width: int, sizes: range) -> Image.Image:
    """`entries` in as many columns as fit, at the first of the font `sizes` at which none is cut, or the last.

    More than 4 entries get the first size at which two columns fit, if there is one: the legend is not to outgrow the
    image.
    """
    pad, marked = 6, any(entry.mark for entry in entries)

    def parts(size: int) -> tuple[int, int]:  # the widths of a swatch and of the longest entry
        swatch = text_width("00", size) + 10 if marked else round(0.8 * size)
        longest = max(text_width(entry.text, size) + _tail_width(entry, size) for entry in entries)
        return swatch, longest + swatch + 3 * pad

    wanted = (2, 1) if len(entries) > 4 else (1,)
    size = next((size for columns in wanted for size in sizes if columns * parts(size)[1] <= width), sizes[-1])
    swatch, longest = parts(size)
    columns = max(1, min(len(entries), width // longest))
    rows, line = math.ceil(len(entries) / columns), line_height(size)
    side, height, down = (line + 4, line + 8, 2) if marked else (swatch, line + 2, 0)
    canvas = blank(width, rows * height + 2 * pad)
    draw = ImageDraw.Draw(canvas)
    for index, entry in enumerate(entries):
        x, y = (index // rows) * (width // columns) + pad, (index % rows) * height + pad + 2
        top = y if marked else y + round(0.22 * size)  # level with the small letters
        draw.rectangle((x, top, x + swatch - 1, top + side - 1), fill=entry.color, outline=HALO)
        middle = x + (swatch - text_width(entry.mark, size)) // 2
        draw.text((middle, y + down), entry.mark, ink_on(entry.color), font(size))
        tail = _tail_width(entry, size)
        shown = shorten(entry.text, size, width // columns - swatch - 3 * pad - tail)
        x += swatch + pad
        draw.text((x, y + down), shown, INK, font(size, shown))
        x += text_width(shown, size) + tail - text_width(entry.tail, size)
        draw.text((x, y + down), entry.tail, INK, font(size, entry.tail))
    return canvas


def _tail_width(entry: Entry, size: int) -> int:
    return text_width(entry.tail, size) + round(0.4 * size) if entry.tail else 0


def ink_on(color: Rgb) -> Rgb:
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return HALO if light > 125 else WHITE


def cell_width(images: Sequence[Image.Image], columns: int, room: int, gap: int) -> int:
    """Width of a cell so that the columns fill about `room`; a multiple of the image's own size if that is tiny."""
    cell = max(96, min(384, room // columns - gap))
    longest = max(max(image.size) for image in images)
    return longest * max(1, round(cell / longest)) if longest <= TINY else cell


def same_length(what: str, items: Sequence[Any], **others: Sequence[Any] | None) -> None:
    for name, other in others.items():
        if other is not None and len(other) != len(items):
            raise ValueError(f"{len(items)} {what} but {len(other)} of {name}")
