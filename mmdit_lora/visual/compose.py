"""What figures are made of: text that is measured and wrapped, images that are fitted and joined. Sizes are in pixels."""

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
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


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


def join(parts: Sequence[Image.Image], *, gap: int = 0, across: bool = False, centre: bool = False) -> Image.Image:
    """`parts` below one another on white, or side by side (`across`); aligned at the left or the top, or `centre`d."""
    along, other = (0, 1) if across else (1, 0)
    wide, place = max(part.size[other] for part in parts), 0
    long = sum(part.size[along] for part in parts) + gap * (len(parts) - 1)
    canvas = blank(long, wide) if across else blank(wide, long)
    for part in parts:
        off = (wide - part.size[other]) // 2 if centre else 0
        canvas.paste(part, (place, off) if across else (off, place))
        place += part.size[along] + gap
    return canvas


def centred(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` in the middle of a white one of at least `width` x `height`."""
    canvas = blank(max(width, image.width), max(height, image.height))
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


# -- text


@lru_cache(maxsize=64)
def _load_font(size: int, latin: bool) -> Any:
    for name in () if latin else _FONTS:  # Pillow's own font knows ASCII and little more
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


def largest_text(text: str, room: tuple[int, int], sizes: range) -> tuple[int, list[str]]:
    """The first of the font `sizes` at which `text` fits into `room` (width, height), and its lines; or 0."""
    for size in sizes:
        lines = wrap(text, size, room[0])
        if max(text_width(line, size) for line in lines) <= room[0] and len(lines) * line_height(size) <= room[1]:
            return size, lines
    return 0, []


def text_block(lines: Sequence[str], size: int, rim: Rgb) -> Image.Image:
    """Dark lines with a rim around their letters, centred on a transparent image that is as large as they are."""
    shape = (max(text_width(line, size) for line in lines), len(lines) * line_height(size))
    block = Image.new("RGBA", shape, (*rim, 0))
    for number, line in enumerate(lines):
        spot = ((shape[0] - text_width(line, size)) // 2, number * line_height(size))
        ImageDraw.Draw(block).text(spot, line, INK, font(size, line), stroke_width=2, stroke_fill=rim)
    return block


def paragraph(
    text: str, width: int, size: int, color: Rgb = INK, *, max_lines: int = 99, centre: bool = False, top: int = 0
) -> Image.Image:
    """`text` wrapped on white, `width` wide, `top` pixels of space above."""
    lines = [shorten(line, size, width) for line in wrap(text, size, width, max_lines)]
    canvas = blank(width, top + len(lines) * line_height(size))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        x = (width - text_width(line, size)) // 2 if centre else 0
        draw.text((x, top + number * line_height(size)), line, color, font(size, line))
    return canvas


# -- legends


class Entry(NamedTuple):
    """One line of a legend: a swatch of `color` with `mark` in it, `text`, and `tail`, which is never cut."""

    color: Rgb
    text: str
    mark: str = ""
    tail: str = ""

    def width(self, size: int) -> int:
        return text_width(self.text, size) + self.tail_width(size)

    def tail_width(self, size: int) -> int:
        return text_width(self.tail, size) + round(0.4 * size) if self.tail else 0


def legend(entries: Sequence[Entry], width: int, sizes: range) -> Image.Image:
    """`entries` in as many columns as fit, at the first of the font `sizes` at which none is cut, or the last.

    More than 4 entries get the first size at which two columns fit, if there is one: the legend is not to outgrow the
    image.
    """
    pad, marked = 6, any(entry.mark for entry in entries)

    def widths(size: int) -> tuple[int, int]:
        """Of a swatch, and of the longest entry with it."""
        swatch = text_width("00", size) + 10 if marked else line_height(size)
        return swatch, max(entry.width(size) for entry in entries) + swatch + 3 * pad

    columns_wanted = (2, 1) if len(entries) > 4 else (1,)
    size = next((size for n in columns_wanted for size in sizes if n * widths(size)[1] <= width), sizes[-1])
    swatch, longest = widths(size)
    columns = max(1, min(len(entries), width // longest))
    rows, line = math.ceil(len(entries) / columns), line_height(size)
    canvas = blank(width, rows * (line + 4) + 2 * pad)
    draw = ImageDraw.Draw(canvas)
    for index, entry in enumerate(entries):
        x, y = (index // rows) * (width // columns) + pad, (index % rows) * (line + 4) + pad + 2
        draw.rectangle((x, y, x + swatch - 1, y + line - 1), fill=entry.color, outline=HALO)
        middle = x + (swatch - text_width(entry.mark, size)) // 2
        draw.text((middle, y), entry.mark, text_color(entry.color), font(size))
        tail = entry.tail_width(size)
        shown = shorten(entry.text, size, width // columns - swatch - 3 * pad - tail)
        x += swatch + pad
        draw.text((x, y), shown, INK, font(size, shown))
        x += text_width(shown, size) + tail - text_width(entry.tail, size)
        draw.text((x, y), entry.tail, INK, font(size, entry.tail))
    return canvas


def text_color(ground: Rgb) -> Rgb:
    """Dark on a light ground, white on a dark one."""
    return HALO if 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 125 else WHITE
