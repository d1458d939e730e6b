"""Figures: boxes at the right pixels, labels inside the image, nothing missing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmdit_lora import Box, Layout
from mmdit_lora.visual.compose import INK, Entry, blank, fit, largest_text, legend, paragraph, shorten, text_width, wrap
from mmdit_lora.visual.drawing import (
    GREY,
    MAX_ENTRIES,
    MAX_LABELS,
    MORE_COLORS,
    OTHERS,
    PALETTE,
    _common,
    _place_tags,
    _to_pixels,
    before_after,
    box_color,
    contact_sheet,
    draw_boxes,
    legend_by_phrase,
    phrase_colors,
    save_png,
    score_row,
)

BLACK = (0, 0, 0)
LAYOUT = Layout("two", [Box((0.25, 0.25, 0.75, 0.5), "a red circle"), Box((0.5, 0.625, 0.875, 0.875), "a blue square")])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def color_extent(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), exclusive, of all pixels of `color`."""
    ys, xs = np.nonzero((pixels(image) == color).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def random_layout(count: int, seed: int, phrase: str = "a phrase") -> Layout:
    rng = np.random.default_rng(seed)
    boxes = []
    for number in range(count):
        x, y = rng.uniform(0, 0.8, 2)
        boxes.append(Box((x, y, x + rng.uniform(0.05, 0.2), y + rng.uniform(0.05, 0.2)), f"{phrase} {number}"))
    return Layout("many", boxes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (384, 384)), ((100, 50), (300, 150)), ((200, 100), (384, 192)), ((1024, 512), (1024, 512))],
)
def test_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw_boxes(Image.new("RGB", size), LAYOUT).size == expected


def test_tiny_images_keep_square_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
    drawn = draw_boxes(Image.fromarray(noise), Layout("nothing", []))
    np.testing.assert_array_equal(pixels(drawn), noise.repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize("background", [BLACK, (255, 255, 255), (128, 128, 128)])
def test_boxes_are_at_their_pixels(background: tuple[int, int, int]) -> None:
    drawn = draw_boxes(Image.new("RGB", (64, 64), background), LAYOUT, labels=False)
    for index, box in enumerate(LAYOUT.boxes):
        expected = tuple(round(value * 384) for value in box.xyxy)
        assert color_extent(drawn, box_color(index)) == expected
        middle = ((expected[0] + expected[2]) // 2, (expected[1] + expected[3]) // 2)
        assert drawn.getpixel(middle) == background
    halo = drawn.getpixel((96 - 1, 150))
    assert sum(halo) < sum(background) or background == BLACK  # a dark hairline outside the colour


@pytest.mark.parametrize("size", [(64, 64), (640, 200), (200, 640), (33, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_any_image(size: tuple[int, int], mode: str) -> None:
    edge = Layout(
        "edges", [Box((0, 0, 1, 1), "all"), Box((0.999, 0.999, 1, 1), "a corner"), Box((0, 0, 0.002, 1), "x")]
    )
    image = Image.new(mode, size)
    drawn = draw_boxes(image, edge)
    assert drawn.mode == "RGB"
    assert drawn.width == fit(image, 384).width or drawn.width == size[0]
    assert image.size == size  # the caller's image is not touched


def test_tags_stay_inside_and_apart() -> None:
    for seed in range(40):
        layout = random_layout(MAX_LABELS, seed, "a long phrase that goes on and on for more than the image holds")
        rects = [_to_pixels(box.xyxy, (384, 256)) for box in layout.boxes]
        places = _place_tags([box.phrase for box in layout.boxes], rects, (384, 256), 13)
        if places is None:  # too tight for phrases: numbers and a legend
            assert draw_boxes(Image.new("RGB", (384, 256)), layout).height > 256
            continue
        for index, place in enumerate(places):
            assert place[0] >= 0
            assert place[1] >= 0
            assert place[2] <= 384
            assert place[3] <= 256
            assert not any(_common(place, other) for other in places[:index])


def test_many_boxes_get_numbers_and_a_legend() -> None:
    few = draw_boxes(Image.new("RGB", (64, 64)), random_layout(2, 1))
    many = draw_boxes(Image.new("RGB", (64, 64)), random_layout(25, 1))
    assert few.size == (384, 384)
    assert many.width == 384
    assert many.height > 384
    legend = pixels(many)[384:]
    for color in PALETTE:
        assert (legend == color).all(-1).any()
    assert draw_boxes(Image.new("RGB", (64, 64)), random_layout(25, 1), labels=False).size == (384, 384)


CELLS = ["a red blood cell"] * 14 + ["a white blood cell"] * 2 + ["a platelet"] * 4


def repeated(phrases: list[str]) -> Layout:
    """A grid of boxes that do not touch, so that every colour shows."""
    side = math.ceil(math.sqrt(len(phrases)))
    boxes = []
    for number, phrase in enumerate(phrases):
        x, y = number % side / side, number // side / side
        boxes.append(Box((x + 0.02, y + 0.02, x + 0.8 / side, y + 0.8 / side), phrase))
    return Layout("cells", boxes)


def test_repeated_phrases_share_a_color_and_a_line_of_the_legend() -> None:
    layout = repeated(CELLS)
    drawn = draw_boxes(Image.new("RGB", (64, 64)), layout)
    assert drawn.width == 384
    assert 384 < drawn.height < 384 + 110  # three lines, not twenty
    image, below = pixels(drawn)[:384], pixels(drawn)[384:]
    ranks = {"a red blood cell": 0, "a platelet": 1, "a white blood cell": 2}  # by count
    for box in layout.boxes:
        left, top, right, bottom = _to_pixels(box.xyxy, (384, 384))
        color = PALETTE[ranks[box.phrase]]
        inside = image[top:bottom, left:right]
        assert (inside[0] == color).all()
        assert (inside[:, -1] == color).all()
        assert (inside[2:-2, 2:-2] == 0).all()  # thin lines, no number, no tag
    for index, color in enumerate(PALETTE):
        assert (below == color).all(-1).any() == (index < 3)
    plain = draw_boxes(Image.new("RGB", (64, 64)), layout, labels=False)
    assert len({plain.getpixel(_to_pixels(box.xyxy, (384, 384))[:2]) for box in layout.boxes}) == len(PALETTE)


def testlegend_by_phrase() -> None:
    red = PALETTE[0]
    assert legend_by_phrase(CELLS)["a red blood cell"] == Entry(red, "a red blood cell", tail="x14")
    assert list(legend_by_phrase(CELLS)) == ["a red blood cell", "a platelet", "a white blood cell"]
    assert legend_by_phrase(["a"] * MAX_LABELS) == {}  # so few have room for tags
    assert legend_by_phrase(["a"] * (MAX_LABELS + 1)) == {"a": Entry(red, "a", tail="x7")}
    assert legend_by_phrase([f"kind {number % 7}" for number in range(10)]) == {}  # hardly any repeat
    assert len(legend_by_phrase([f"kind {number % 6}" for number in range(9)])) == 6


@pytest.mark.parametrize(("kinds", "cut"), [(MAX_ENTRIES, 0), (MAX_ENTRIES + 1, 2), (MAX_ENTRIES + 4, 5)])
def test_a_long_legend_is_cut(kinds: int, cut: int) -> None:
    phrases = [f"kind {number % kinds}" for number in range(3 * kinds)]
    entries = legend_by_phrase(phrases)
    assert set(entries) == set(phrases)
    lines = list(dict.fromkeys(entries.values()))
    assert len(lines) == MAX_ENTRIES
    assert len({line.color for line in lines}) == MAX_ENTRIES  # one colour never stands for two phrases
    assert {line.color for line in lines} <= {*PALETTE, *MORE_COLORS, OTHERS}
    assert [line.text for line in lines if line.color == OTHERS] == ([f"and {cut} more"] if cut else [])
    drawn = draw_boxes(Image.new("RGB", (64, 64)), repeated(phrases))
    assert drawn.height < 384 + 180
    assert (pixels(drawn)[384:] == OTHERS).all(-1).any() == bool(cut)


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (1024, 1024), (512, 768)])
def test_the_legend_can_be_read_in_a_contact_sheet(size: tuple[int, int]) -> None:
    drawn = draw_boxes(Image.new("RGB", size), repeated(CELLS))
    height = fit(Image.new("RGB", size), max(384, *size)).height
    below = drawn.crop((0, height, drawn.width, drawn.height))
    swatch = color_extent(below, PALETTE[0])
    scale = 256 / max(drawn.size)
    assert (swatch[3] - swatch[1] + 2) / 0.8 * scale >= 10  # font size after the sheet has scaled it down
    assert drawn.height - height < 0.4 * height


def test_a_legend_cuts_phrases_but_not_counts() -> None:
    entries = [Entry(PALETTE[0], "a phrase far too long for so little room", tail="x14")]
    drawn = legend(entries, 120, range(20, 13, -1))
    short = legend([Entry(PALETTE[0], "a", tail="x14")], 120, range(14, 13, -1))
    assert drawn.size == (120, short.height)  # the smallest size
    tail, ink = text_width("x14", 14), pixels(drawn).sum(-1) < 200
    assert ink[:, 120 - 8 - tail :].any()
    assert not ink[:, 120 - 5 :].any()


@pytest.mark.parametrize("phrases", [CELLS, [f"a phrase {number}" for number in range(20)]])
def test_many_boxes_have_thinner_lines(phrases: list[str]) -> None:
    def covered(layout: Layout) -> int:
        image = pixels(draw_boxes(Image.new("RGB", (384, 384), (255, 255, 255)), layout, labels=False))
        left, top, right, bottom = _to_pixels(layout.boxes[0].xyxy, (384, 384))
        return int((image[(top + bottom) // 2, left : (left + right) // 2] != 255).any(-1).sum())

    assert covered(repeated(phrases)) == 2
    assert covered(Layout("few", repeated(phrases).boxes[:MAX_LABELS])) == 4  # with the inner hairline


def test_no_boxes() -> None:
    image = Image.new("RGB", (300, 400), (10, 20, 30))
    assert (pixels(draw_boxes(image, Layout("nothing", []), scale_to=100)) == (10, 20, 30)).all()


def test_same_boxes_on_top_of_one_another() -> None:
    layout = Layout("stack", [Box((0.4, 0.4, 0.6, 0.6), f"thing {number}") for number in range(MAX_LABELS)])
    assert draw_boxes(Image.new("RGB", (64, 64)), layout).width == 384


def test_contact_sheet() -> None:
    sizes = [(64, 64), (100, 40), (30, 300), (500, 200), (64, 64), (64, 64), (64, 64)]
    images = [Image.new("RGB", size, BLACK) for size in sizes]
    plain = contact_sheet(images, columns=3)
    assert plain.width == 3 * 256 + 2 * 18 + 2 * 24
    text = ["a caption of many words that needs two lines at least, and here they are", *["b"] * 6]
    full = contact_sheet(images, [LAYOUT] * 7, columns=3, captions=text, title="A title")
    assert full.width == plain.width
    assert full.height > plain.height
    assert (pixels(full)[:20] == 255).all()
    assert (pixels(full)[:, -20:] == 255).all()
    for color in PALETTE[:2]:
        assert (pixels(full) == color).all(-1).sum() > 1000
    assert contact_sheet(images[:1]).size == (256 + 48, 256 + 48)


def test_contact_sheet_refuses() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="2 images but 1 of layouts"):
        contact_sheet([Image.new("RGB", (8, 8))] * 2, [LAYOUT])


@pytest.mark.parametrize("columns", [1, 2, 6, 8])
@pytest.mark.parametrize("size", [(64, 64), (512, 512), (640, 384), (384, 640)])
def test_before_after_has_all_rows(columns: int, size: tuple[int, int]) -> None:
    before = [Image.new("RGB", size, (200, 0, 0))] * columns
    after = [Image.new("RGB", size, (0, 0, 200))] * columns
    truth = [Image.new("RGB", size, (0, 200, 0))] * columns
    layouts = [LAYOUT] * columns
    two = before_after(layouts, before, after)
    three = before_after(layouts, before, after, truth=truth, scores=([0.4] * columns, [0.9] * columns))
    assert three.width == two.width
    assert three.height > two.height
    if columns >= 6:
        assert 1800 <= two.width <= 2250
    bands = [color_extent(three, color) for color in ((200, 0, 0), (0, 0, 200), (0, 200, 0))]
    for above, below in itertools.pairwise(bands):
        assert above[3] < below[1]
        assert above[0::2] == below[0::2]  # the columns are aligned
    for image in (two, three):
        assert (pixels(image)[:, :20] == 255).all()
        assert (pixels(image)[-20:] == 255).all()
    # the sketch of the layout lies above the first images, its boxes over theirs
    sketch = three.crop((0, 0, three.width, bands[0][1] - 4))
    in_images = color_extent(three.crop((0, bands[0][1], three.width, bands[0][3])), box_color(0))
    assert color_extent(sketch, box_color(0))[0::2] == in_images[0::2]


def test_scores_are_written_and_the_better_one_is_dark() -> None:
    image = [Image.new("RGB", (64, 64), (0, 0, 200))]
    bare = score_row("", image, 64, gutter=200, gap=0)
    for score, color, other in ((0.4, GREY, INK), (0.9, INK, GREY)):
        band = score_row("", image, 64, gutter=200, gap=0, scores=[score], best=[0.9])
        under = pixels(band.crop((200, bare.height, 264, band.height)))
        assert (under == color).all(-1).any()
        assert not (under == other).all(-1).any()
    before_after([LAYOUT], image, image, scores=([float("nan")], [0.5]))


def test_before_after_refuses() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="at least one layout"):
        before_after([], [], [])
    with pytest.raises(ValueError, match="1 layouts but 2 of after"):
        before_after([LAYOUT], [image], [image] * 2)
    with pytest.raises(ValueError, match="1 layouts but 0 of scores"):
        before_after([LAYOUT], [image], [image], scores=([0.1], []))


def test_before_after_does_not_depend_on_the_day() -> None:
    image = [Image.new("RGB", (64, 64))] * 6
    layouts = [random_layout(9, seed) for seed in range(6)]
    one, two = (before_after(layouts, image, image) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_text() -> None:
    assert shorten("short", 14, 200) == "short"
    cut = shorten("a very long phrase that does not fit", 14, 100)
    assert cut.endswith("…")
    assert text_width(cut, 14) <= 100
    assert wrap("one two three", 14, text_width("one two", 14)) == ["one two", "three"]
    assert len(wrap("one two three four five", 14, 1, max_lines=2)) == 2
    assert largest_text("word", (200, 40), range(30, 12, -1))[0] == 30
    assert largest_text("word", (10, 40), range(30, 12, -1)) == (0, [])
    assert paragraph("", 100, 14, INK).size == (100, 0)
    assert text_width("椅子 niño", 14) > 0  # letters that Pillow's own font lacks
    assert blank(3, 4).size == (3, 4)


def test_save_png(tmp_path) -> None:
    image = Image.new("RGB", (20, 10))
    ImageDraw.Draw(image).ellipse((2, 2, 8, 8), fill=(255, 0, 0))
    save_png(image, tmp_path / "deep" / "image.png")
    with Image.open(tmp_path / "deep" / "image.png") as read:
        assert read.format == "PNG"
        assert pixels(read).tobytes() == pixels(image).tobytes()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["image.png"]


def test_a_phrase_has_one_colour_over_all_layouts_of_a_sheet() -> None:
    red, blue = Box((0.1, 0.1, 0.45, 0.45), "a red circle"), Box((0.55, 0.55, 0.9, 0.9), "a blue  square")
    layouts = [Layout("one", [red]), Layout("two", [blue, red]), Layout("three", [red, blue])]
    colors = phrase_colors(layouts)
    assert colors == {"a red circle": PALETTE[0], "a blue square": PALETTE[1]}
    images = [Image.new("RGB", (64, 64))] * 3
    drawn = [draw_boxes(image, layout, colors=colors) for image, layout in zip(images, layouts, strict=True)]
    for layout, sheet_image in zip(layouts, drawn, strict=True):
        for box in layout.boxes:
            left, _, right, bottom = _to_pixels(box.xyxy, sheet_image.size)
            assert sheet_image.getpixel((right - 1, bottom - 1)) == colors[" ".join(box.phrase.split())]
            assert sheet_image.getpixel((left, bottom - 1)) == colors[" ".join(box.phrase.split())]
    sheet = contact_sheet(images, layouts, columns=3)
    for column, first in enumerate((red, blue, red)):
        x = 24 + column * (256 + 18)
        left, _, _, bottom = _to_pixels(first.xyxy, (256, 256))
        assert sheet.getpixel((x + left, 24 + bottom - 1)) == colors[" ".join(first.phrase.split())]


def test_colours_of_many_phrases_are_distinct_and_the_crowd_s_legend_has_them() -> None:
    many = [Layout("many", [Box((0.0, 0.0, 0.5, 0.5), f"kind {number}")]) for number in range(64)]
    colors = phrase_colors(many)
    assert len({*colors.values()}) == 64
    assert [*colors.values()][: len(PALETTE)] == list(PALETTE)
    assert phrase_colors([*many, Layout("x", [Box((0, 0, 1, 1), "one more")])])["one more"] == PALETTE[0]
    crowd = repeated([*["kind 40"] * 5, *["kind 50"] * 4])
    drawn = draw_boxes(Image.new("RGB", (64, 64)), crowd, colors=colors)
    for phrase in ("kind 40", "kind 50"):
        assert (pixels(drawn)[384:] == colors[phrase]).all(-1).any()


def test_very_long_texts_and_very_many_boxes_take_no_time() -> None:
    text = "word " * 200_000
    short = shorten(text, 14, 200)
    assert short.endswith("…")
    assert text_width(short, 14) <= 200
    assert shorten("i" * 1000, 14, 200)[:-1] == "i" * (len(shorten("i" * 1000, 14, 200)) - 1)
    assert shorten("word", 14, 1) == "…"
    assert len(wrap(text, 14, 200, max_lines=3)) == 3
    many = draw_boxes(Image.new("RGB", (64, 64)), random_layout(2000, 0))
    assert many.size == (384, 384)
