"""Images for people: boxes drawn on images, contact sheets, and the before/after figure.

All sizes are in pixels of the figure. Rectangles are (left, top, right, bottom), right and bottom exclusive.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from mmdit_lora.files import atomic_file
from mmdit_lora.layout import Layout
from mmdit_lora.visual.compose import (
    HALO,
    INK,
    TINY,
    WHITE,
    Entry,
    Rgb,
    blank,
    centred,
    fit,
    font,
    join,
    largest_text,
    legend,
    line_height,
    one_line,
    paragraph,
    shorten,
    text_block,
    text_color,
    text_width,
    wrap,
)

Rect = tuple[int, int, int, int]
_MARK = "mmdit_lora"  # a text of a PNG

# Okabe and Ito's palette: distinct with every common colour blindness. Its black is left out: halos are dark. Those that
# show on both light and dark images come first.
PALETTE: tuple[Rgb, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
    (240, 228, 66),
)
# For phrases, where a colour must not come twice.
MORE_COLORS: tuple[Rgb, ...] = (WHITE, (150, 75, 200), (130, 80, 40))
OTHERS: Rgb = (150, 150, 150)
_DISTINCT = 64  # colours of a run's phrases; the next ones begin again
GREY, FAINT, PALE = (104, 112, 122), (214, 219, 225), (246, 247, 249)
SMALLEST = 13  # font size of a phrase in the figure
MAX_LABELS = 6  # more phrases than this on one image hide it: the boxes get numbers, the phrases a legend
MAX_NUMBERS = (
    100  # more boxes of different phrases get no numbers: they would hide the image, and their legend all else
)
MAX_ENTRIES = len(PALETTE + MORE_COLORS)  # lines of a legend of phrases


def draw_boxes(
    image: Image.Image,
    layout: Layout,
    *,
    scale_to: int = 384,
    labels: bool = True,
    colors: Mapping[str, Rgb] | None = None,
) -> Image.Image:
    """The image, enlarged, with its boxes and their phrases drawn on it.

    Args:
        image: any mode and size.
        layout: its boxes are drawn in the order given, each in the colour `box_color(index)`; their lines are thinner
            where there are more than 6.
        scale_to: an image whose longer side is shorter is enlarged to it; one of at most 128 px by the largest whole
            number that fits, so that its pixels stay squares. A larger image keeps its size.
        labels: draw the phrases. With more than 6 boxes, or where tags would cover one another, boxes get numbers and
            the phrases stand in a legend below, which makes the result taller; the width never changes. If at most
            two thirds of more than 6 phrases are distinct, boxes get no numbers but the colour of their phrase, and
            the legend has one entry a phrase with its count, the most frequent first, at most 10 lines. More than 100 boxes
            get neither numbers nor a legend, unless phrases repeat so.
        colors: the colour of each phrase, from `phrase_colors` of all layouts that are shown together, so that a phrase has
            one colour in all of them. None = by the place of the box in its layout.

    Returns:
        A new RGB image; its top left part is the enlarged image.
    """
    canvas = image.convert("RGB") if max(image.size) >= scale_to else fit(image, scale_to)
    canvas = canvas.copy() if canvas is image else canvas
    rects = [_to_pixels(box.xyxy, canvas.size) for box in layout.boxes]
    phrases = [one_line(box.phrase) for box in layout.boxes]
    entries = legend_by_phrase(phrases, colors) if labels else {}
    of_boxes = [entries[phrase].color for phrase in phrases] if entries else _box_colors(phrases, colors)
    crowded = len(rects) > MAX_LABELS
    for color, rect in zip(of_boxes, rects, strict=True):
        _outline(canvas, rect, color, width=(3 if min(canvas.size) < 768 else 4) - crowded, inner=not crowded)
    if not labels or not rects or (len(rects) > MAX_NUMBERS and not entries):
        return canvas
    if entries:  # the text is so large that it can still be read where the result is scaled down to 256 px
        large = max(12, round(max(canvas.width, 1.2 * canvas.height) / 22))
        sizes = range(large, max(11, round(0.7 * large) - 1), -1)
        return join([canvas, legend(list(dict.fromkeys(entries.values())), canvas.width, sizes)])
    size = max(12, min(22, round(min(canvas.size) / 28)))
    if not crowded and (places := _place_tags(phrases, rects, canvas.size, size)) is not None:
        _draw_tags(canvas, phrases, places, size, of_boxes)
        return canvas
    numbers = [str(index + 1) for index in range(len(rects))]
    _draw_tags(canvas, numbers, _place_tags(numbers, rects, canvas.size, size, insist=True) or [], size, of_boxes)
    lines = [Entry(*entry) for entry in zip(of_boxes, phrases, numbers, strict=True)]
    return join([canvas, legend(lines, canvas.width, range(size, size - 1, -1))])


def contact_sheet(
    images: Sequence[Image.Image],
    layouts: Sequence[Layout] | None = None,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 256,
) -> Image.Image:
    """A grid of images on white, row by row.

    Args:
        images: at least one; each is fitted into the width of a cell, whatever its size.
        layouts: one an image; its boxes are drawn on it, a phrase in one colour over the whole sheet.
        columns: default: as many as make the grid about as wide as high, and at most 5 in one row alone.
        captions: one an image; wrapped below it, at most 3 lines.
        title: above the grid.
        cell: width of a cell; the longer side of an image.

    Raises:
        ValueError: there is no image, or not as many layouts or captions as images.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    _same_length("images", images, layouts=layouts, captions=captions)
    colors = phrase_colors(layouts or ())
    columns = columns or (len(images) if len(images) <= 5 else math.ceil(math.sqrt(len(images))))
    cells = []
    for index, image in enumerate(images):
        shown = fit(image, cell)
        if layouts:
            shown = draw_boxes(shown, layouts[index], scale_to=1, colors=colors)
        parts = [centred(shown, cell, 0)]
        if captions:
            parts.append(paragraph(captions[index], cell, 14, GREY, max_lines=3, top=6))
        cells.append(join(parts))
    grid = join(
        [join(cells[start : start + columns], gap=18, across=True) for start in range(0, len(cells), columns)], gap=18
    )
    return _framed([paragraph(title, grid.width, 22), blank(1, 14), grid] if title else [grid], 24)


def before_after(
    layouts: Sequence[Layout],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    *,
    truth: Sequence[Image.Image] | None = None,
    title: str = "The same layouts, seeds and steps, before and after training",
    before_label: str = "before: the base",
    after_label: str = "after: base + adapter",
    scores: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Image.Image:
    """The figure of what the adapter does: one column a layout; rows: the layout, before, after, and the ground truth.

    The requested boxes are outlined on every image. Made for 5 to 8 columns, which give about 2000 px of width.

    Args:
        layouts: one a column, at least one.
        before: images of the base, one a column.
        after: images with the adapter, one a column.
        truth: optional ground truth, one a column; a row below.
        title: above the figure.
        before_label: left of its row; what precedes a colon is set large, what follows it small below.
        after_label: likewise.
        scores: mean IoU of each image, (before, after), printed under the images, their means under the row labels.

    Raises:
        ValueError: there is no layout, or not one image and score for each.
    """
    if not layouts:
        raise ValueError("the figure needs at least one layout")
    _same_length("layouts", layouts, before=before, after=after, truth=truth)
    for values in scores or ():
        _same_length("layouts", layouts, scores=values)
    gutter, gap, margin = 230, 22, 44
    cell = max(96, min(384, (2040 - gutter - 2 * margin) // len(layouts) - gap))
    longest = max(max(image.size) for image in before)
    if longest <= TINY:
        cell = longest * max(1, round(cell / longest))
    colors = phrase_colors(layouts)
    sketches = [_sketch(layout, fit(image, cell).size, colors) for layout, image in zip(layouts, after, strict=True)]
    bands = [score_row("layout: what is asked for", sketches, cell, gutter=gutter, gap=gap)]
    best = [max(pair) for pair in zip(*scores, strict=True)] if scores else None
    rows: list[tuple[str, Sequence[Image.Image], Sequence[float] | None]]
    rows = [(before_label, before, scores and scores[0]), (after_label, after, scores and scores[1])]
    if truth is not None:
        rows.append(("truth: the image of the data set", truth, None))
    for label, images, row_scores in rows:
        drawn = [
            draw_boxes(fit(image, cell), layout, scale_to=1, labels=False, colors=colors)
            for image, layout in zip(images, layouts, strict=True)
        ]
        bands.append(score_row(label, drawn, cell, gutter=gutter, gap=gap, scores=row_scores, best=best))
    figure = join(bands, gap=26)
    return _framed([paragraph(title, figure.width, 38), blank(1, 32), figure], margin)


def save_png(image: Image.Image, path: str | Path, *, mark: bool = False) -> None:
    """Write `image` to `path` as PNG, atomically.

    Args:
        mark: have `is_marked_png` know it again, as long as nobody changes a pixel.
    """
    text = PngInfo()
    if mark:
        text.add_text(_MARK, _digest(image))
    with atomic_file(path) as temporary:
        # Level 3 takes an eighth of the time of `optimize` for a tenth more bytes.
        image.save(temporary, format="PNG", compress_level=3, pnginfo=text)


def is_marked_png(path: Path) -> bool:
    """Whether a file is what `save_png` wrote with `mark`, unchanged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return _MARK in image.info and image.info[_MARK] == _digest(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


# -- colours


def box_color(index: int) -> Rgb:
    """The colour of box number `index` (from 0) of a layout that is shown alone."""
    return PALETTE[index % len(PALETTE)]


def phrase_colors(layouts: Iterable[Layout]) -> dict[str, Rgb]:
    """One colour for each phrase of all `layouts`, the most frequent phrases first, then in their order.

    The first 64 phrases have colours of their own; the next ones begin again.
    """
    counts = Counter(one_line(box.phrase) for layout in layouts for box in layout.boxes)
    colors = _distinct_colors()
    return {phrase: colors[rank % len(colors)] for rank, (phrase, _) in enumerate(counts.most_common())}


@cache
def _distinct_colors() -> tuple[Rgb, ...]:
    """The palettes without white, then hues by the golden ratio, so that each lies between those before it."""
    colors = [*PALETTE, *MORE_COLORS[1:]]
    for index in range(_DISTINCT - len(colors)):
        strength, light = ((1.0, 0.85), (0.5, 1.0), (0.9, 0.55))[index % 3]
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, strength, light)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colors)


def legend_by_phrase(phrases: Sequence[str], colors: Mapping[str, Rgb] | None = None) -> dict[str, Entry]:
    """The entry of the legend for each distinct phrase, the most frequent first; empty where few or hardly any repeat."""
    counts = Counter(phrases).most_common()
    if len(phrases) <= MAX_LABELS or 3 * len(counts) > 2 * len(phrases):
        return {}
    shown = len(counts) if len(counts) <= MAX_ENTRIES else MAX_ENTRIES - 1
    others = Entry(OTHERS, f"and {len(counts) - shown} more")
    own = PALETTE + MORE_COLORS
    # The letter x: Pillow's own font has no multiplication sign.
    return {
        phrase: Entry(colors[phrase] if colors else own[rank], phrase, tail=f"x{count}") if rank < shown else others
        for rank, (phrase, count) in enumerate(counts)
    }


def _box_colors(phrases: Sequence[str], colors: Mapping[str, Rgb] | None) -> list[Rgb]:
    return [colors[phrase] if colors else box_color(index) for index, phrase in enumerate(phrases)]


# -- boxes and their tags


def _to_pixels(xyxy: tuple[float, float, float, float], size: tuple[int, int]) -> Rect:
    width, height = size
    left, top = min(round(xyxy[0] * width), width - 1), min(round(xyxy[1] * height), height - 1)
    return left, top, max(round(xyxy[2] * width), left + 1), max(round(xyxy[3] * height), top + 1)


def _outline(canvas: Image.Image, rect: Rect, color: Rgb, *, width: int, inner: bool = True) -> None:
    """A coloured line just inside `rect`; soft dark hairlines outside and `inner` keep it visible on any background."""
    left, top, right, bottom = rect[0], rect[1], rect[2] - 1, rect[3] - 1
    draw = ImageDraw.Draw(canvas, "RGBA")
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(*HALO, 170))
    if inner and min(right - left, bottom - top) > 2 * width:
        draw.rectangle((left + width, top + width, right - width, bottom - width), outline=(*HALO, 170))
    draw.rectangle((left, top, right, bottom), outline=color, width=max(1, min(width, right - left, bottom - top)))


def _place_tags(
    texts: Sequence[str], rects: Sequence[Rect], canvas: tuple[int, int], size: int, *, insist: bool = False
) -> list[Rect] | None:
    """A place for each tag, inside the canvas and at its box; None where they would hide one another (unless `insist`)."""
    taken: list[Rect] = []
    for text, (left, top, right, bottom) in zip(texts, rects, strict=True):
        room = max(right - left, round(0.6 * canvas[0]))
        width, height = min(text_width(text, size) + 10, room), line_height(size) + 4
        spots = [(left, top - height), (left, bottom), (left, top), (right - width, top), (left, bottom - height)]
        spots += [(right - width, top - height), (right - width, bottom), (right - width, bottom - height)]
        spots += [(right, top), (left - width, top)]
        spots += [(x, y) for y in range(top, bottom, 4) for x in (left, right - width)]
        # A tag hides as little as possible: of its own box, and worse, of another, where it would also be read wrongly.
        others = [rect for rect in rects if rect != (left, top, right, bottom)]
        hides = [(left, top, right, bottom), *others, *others]
        taken.append(_best_place(spots, (width, height), canvas, taken, hides))
    hidden = any(_common(a, b) for index, a in enumerate(taken) for b in taken[:index])
    return None if hidden and not insist else taken


def _best_place(
    spots: Sequence[tuple[int, int]],
    size: tuple[int, int],
    canvas: tuple[int, int],
    taken: Sequence[Rect],
    hides: Sequence[Rect] = (),
) -> Rect:
    """The first of `spots` (left, top), moved into the canvas, with the least cover of `taken`, then of `hides`."""
    best, best_cost = (0, 0, 0, 0), math.inf
    for x, y in spots:
        left, top = max(0, min(x, canvas[0] - size[0])), max(0, min(y, canvas[1] - size[1]))
        place = (left, top, left + size[0], top + size[1])
        away = abs(left - x) + abs(top - y)  # a spot that had to be moved is no longer at its corner
        cost = 1000.0 * sum(_common(place, other) for other in taken) + sum(_common(place, other) for other in hides)
        cost += size[1] * away / 2
        if cost < best_cost:
            best, best_cost = place, cost
    return best


def _draw_tags(
    canvas: Image.Image, texts: Sequence[str], places: Sequence[Rect], size: int, colors: Sequence[Rgb]
) -> None:
    draw = ImageDraw.Draw(canvas)
    for text, color, (left, top, right, bottom) in zip(texts, colors, places, strict=True):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=color, outline=HALO)
        shown = shorten(text, size, right - left - 10)
        draw.text((left + 5, top + 2), shown, text_color(color), font(size, shown))


def _common(a: Rect, b: Rect) -> int:
    """Pixels that both cover."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


# -- sheets and the figure


def _framed(parts: Sequence[Image.Image], margin: int) -> Image.Image:
    return ImageOps.expand(join(parts), margin, WHITE)


def _same_length(what: str, items: Sequence[Any], **others: Sequence[Any] | None) -> None:
    for name, other in others.items():
        if other is not None and len(other) != len(items):
            raise ValueError(f"{len(items)} {what} but {len(other)} of {name}")


def _sketch(layout: Layout, size: tuple[int, int], colors: Mapping[str, Rgb]) -> Image.Image:
    """The layout alone: pale paper of `size`, each box lightly filled, its phrase inside as large as it fits."""
    canvas = Image.new("RGB", size, PALE)
    draw = ImageDraw.Draw(canvas, "RGBA")
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=FAINT)
    rects = [_to_pixels(box.xyxy, size) for box in layout.boxes]
    phrases = [one_line(box.phrase) for box in layout.boxes]
    areas = [((r[0], r[1], r[2] - 1, r[3] - 1), c) for r, c in zip(rects, _box_colors(phrases, colors), strict=True)]
    for area, color in areas:
        draw.rectangle(area, fill=(*color, 56))
    for area, color in areas:
        draw.rectangle(area, outline=color, width=3)
    taken: list[Rect] = []
    for rect, phrase in zip(rects, phrases, strict=True):
        taken.append(_write_phrase(canvas, phrase, rect, taken))
    return canvas


def _write_phrase(canvas: Image.Image, phrase: str, rect: Rect, taken: Sequence[Rect]) -> Rect:
    """Write `phrase` inside `rect`, turned if `rect` is tall; off every rectangle in `taken`, perhaps over its edges."""
    room = (rect[2] - rect[0] - 10, rect[3] - rect[1] - 8)
    sizes = range(max(18, round(canvas.width / 11)), SMALLEST - 1, -1)
    size, lines = largest_text(phrase, room, sizes)
    turned_size, turned_lines = largest_text(phrase, (room[1], room[0]), sizes)
    turned = room[1] > 1.5 * room[0] and turned_size >= size + 3
    if turned:
        size, lines = turned_size, turned_lines
    if not size:
        size, lines = SMALLEST, wrap(phrase, SMALLEST, max(room[0], 72), max_lines=3)
    block = text_block(lines, size, PALE)
    if turned:
        block = block.transpose(Image.Transpose.ROTATE_90)
    x, y = (rect[0] + rect[2] - block.width) // 2, (rect[1] + rect[3] - block.height) // 2
    spots = [(x, y), *((x, y + sign * dy) for dy in range(4, canvas.height, 4) for sign in (-1, 1))]
    place = _best_place(spots, block.size, canvas.size, taken)
    canvas.paste(block, place, block)
    return place


def score_row(
    label: str,
    images: Sequence[Image.Image],
    cell: int,
    *,
    gutter: int,
    gap: int,
    scores: Sequence[float] | None = None,
    best: Sequence[float] | None = None,
) -> Image.Image:
    """One row of the figure: its label, `gutter` wide, and its images in cells with their scores, the best ones dark.

    Args:
        label: "before: the base" gives a large word and a small line below, then the mean score.
    """
    height = max(image.height for image in images)
    cells = []
    for column, image in enumerate(images):
        parts = [centred(image, cell, height)]
        if scores is not None:
            color = INK if best is None or scores[column] >= best[column] else GREY
            parts.append(paragraph(f"IoU {_score(scores[column])}", cell, 24, color, centre=True, top=10))
        cells.append(join(parts))
    head, _, tail = label.partition(":")
    lines = [paragraph(head.strip(), gutter - 24, 36, max_lines=3)]
    if tail.strip():
        lines.append(paragraph(tail.strip(), gutter - 24, 22, GREY, max_lines=3, top=4))
    if scores is not None and len(scores):
        mean = sum(scores) / len(scores)
        lines.append(paragraph(f"mean IoU {_score(mean)}", gutter - 24, 22, top=12))
    words = centred(join(lines), 0, height)
    return join([join([words, blank(gutter, 0)]), join(cells, gap=gap, across=True)], across=True)


def _score(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "n/a"
