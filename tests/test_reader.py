"""The reader judges everything else, so it is judged here: near 1 on ground truth, near chance on shuffled layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mmdit_lora.data.shapes import COLORS, DOMAINS, SHAPES, make_scene, phrase_attributes, shape_coverage
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection, match
from mmdit_lora.evaluation.detectors.shapes import (
    Fidelity,
    _render,
    detect,
    detect_all,
    measure,
    per_image,
    readable,
    summarise,
)
from mmdit_lora.layout import Box, Layout

SCENES = 32

# Lowest fidelity of ground truth: miou; and iou50, colour and shape. As drawn, and with noise and blur. Over 400 images
# a domain miou was 0.990, 0.989, 0.988, 0.984, 0.988 as drawn, with every colour and shape right. The generator draws edges in
# quarters of a pixel, which costs a third to a half of what is missing to 1.
CEILING = {
    "basic": (0.98, 0.995),
    "sparse": (0.98, 0.995),
    "mixed": (0.975, 0.99),
    "dense": (0.97, 0.99),
    "page": (0.975, 0.99),
}
WORN = {
    "basic": (0.97, 0.99),
    "sparse": (0.97, 0.99),
    "mixed": (0.96, 0.98),
    "dense": (0.95, 0.97),
    "page": (0.965, 0.98),
}


@cache
def scenes(domain: str) -> tuple[list[Image.Image], list[Layout]]:
    images, layouts = zip(*(make_scene(DOMAINS[domain], 11, index) for index in range(SCENES)), strict=True)
    return list(images), list(layouts)


def noisy(image: Image.Image, std: float = 6.0) -> Image.Image:
    rng = np.random.default_rng(image.tobytes()[0])
    array = np.asarray(image) + rng.normal(0, std, (image.height, image.width, 3))
    return Image.fromarray(array.round().clip(0, 255).astype(np.uint8))


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.7))


def faded(image: Image.Image) -> Image.Image:
    """A third of the colour gone, and a tint over all."""
    array = np.asarray(image).astype(float)
    array = array.mean(-1, keepdims=True) * 0.33 + array * 0.67 + [6, -4, 8]
    return Image.fromarray(array.round().clip(0, 255).astype(np.uint8))


def drawn(*things: tuple[str, str, tuple[float, float, float, float]], grey: int = 128, size: int = 64) -> Image.Image:
    """An image of (colour, shape, box in pixels), one over the other."""
    canvas = np.full((size, size, 3), float(grey))
    for color, shape, xyxy in things:
        ink = shape_coverage(shape, xyxy, size)[..., None]
        canvas = canvas * (1 - ink) + np.array(COLORS[color]) * ink
    return Image.fromarray(canvas.round().astype(np.uint8))


def renamed(layout: Layout, change: Callable[[str, str], tuple[str, str]]) -> Layout:
    boxes = []
    for box in layout.boxes:
        known = phrase_attributes(box.phrase)
        assert known is not None
        color, shape = change(*known)
        boxes.append(replace(box, phrase=f"a {color} {shape}"))
    return replace(layout, boxes=tuple(boxes))


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_ground_truth_is_near_one(domain: str) -> None:
    found = measure(*scenes(domain))
    miou, right = CEILING[domain]
    assert found.miou >= miou
    assert min(found.iou50, found.color_acc, found.shape_acc) >= right
    assert found.boxes == sum(len(layout.boxes) for layout in scenes(domain)[1])
    # Nothing is seen that is not there.
    assert sum(map(len, detect_all(scenes(domain)[0]))) <= found.boxes * 1.01


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_shuffled_layouts_are_near_chance(domain: str) -> None:
    images, layouts = scenes(domain)
    found = measure(images, layouts[1:] + layouts[:1])
    assert found.miou < 0.3
    assert found.iou50 < 0.25
    assert max(found.color_acc, found.shape_acc) < 0.3


@pytest.mark.parametrize(
    "wear", [noisy, blurred, lambda p: noisy(blurred(p)), faded], ids=["noise", "blur", "both", "faded"]
)
@pytest.mark.parametrize("domain", list(DOMAINS))
def test_noise_blur_and_faded_colours_cost_little(domain: str, wear: Callable[[Image.Image], Image.Image]) -> None:
    images, layouts = (part[:16] for part in scenes(domain))
    found = measure([wear(image) for image in images], layouts)
    miou, right = WORN[domain]
    assert found.miou >= miou
    assert min(found.iou50, found.color_acc, found.shape_acc) >= right


@pytest.mark.parametrize("side", [10, 14, 24, 44])
def test_every_shape_and_colour_of_every_size(side: int) -> None:
    rng = np.random.default_rng(side)
    images, layouts = [], []
    for color in COLORS:
        for shape in SHAPES:
            width, height = side * rng.uniform(1, 1.3, 2)
            x0, y0 = rng.uniform(1, 63 - width), rng.uniform(1, 63 - height)
            box = (x0, y0, x0 + width, y0 + height)
            images.append(drawn((color, shape, box), grey=int(rng.choice([20, 130, 240]))))
            relative = tuple(value / 64 for value in box)
            layouts.append(Layout("", (Box(relative, f"a {color} {shape}"),)))  # type: ignore[arg-type]
    found = measure([noisy(image, 3) for image in images], layouts)
    assert (found.iou50, found.color_acc, found.shape_acc) == (1, 1, 1)
    assert found.miou > 0.96


def test_nothing_to_see_scores_zero() -> None:
    _, layouts = (part[:8] for part in scenes("basic"))
    for grey in (0, 128, 255):
        plain = noisy(Image.new("RGB", (64, 64), (grey,) * 3))
        assert detect(plain) == []
        found = measure([plain] * len(layouts), layouts)
        assert (found.miou, found.iou50, found.color_acc, found.shape_acc) == (0, 0, 0, 0)
    assert detect(drawn(("red", "square", (30, 30, 33, 33)))) == []  # a speck


def test_wrong_colours_and_wrong_shapes_are_told_apart_from_wrong_boxes() -> None:
    images, layouts = (part[:16] for part in scenes("basic"))
    right, names = measure(images, layouts), list(COLORS)
    other = measure(images, [renamed(x, lambda c, s: (names[names.index(c) - 1], s)) for x in layouts])
    assert (other.color_acc, other.shape_acc) == (0, right.shape_acc)
    assert other.miou == pytest.approx(right.miou, abs=0.01)
    other = measure(images, [renamed(x, lambda c, s: (c, SHAPES[SHAPES.index(s) - 1])) for x in layouts])
    assert (other.color_acc, other.shape_acc) == (right.color_acc, 0)
    assert other.miou == right.miou


def test_another_box_convention_scores_low() -> None:
    images, layouts = (part[:16] for part in scenes("basic"))

    def converted(change: Callable[..., tuple[float, ...]]) -> list[Layout]:
        return [
            replace(
                x, boxes=tuple(replace(b, xyxy=tuple(min(max(v, 0.0), 1.0) for v in change(*b.xyxy))) for b in x.boxes)
            )
            for x in layouts
        ]

    transposed = converted(lambda x0, y0, x1, y1: (y0, x0, y1, x1))
    assert measure(images, transposed).miou < 0.4
    centred = converted(lambda x0, y0, x1, y1: (x0 - (x1 - x0) / 2, y0 - (y1 - y0) / 2, (x0 + x1) / 2, (y0 + y1) / 2))
    assert measure(images, centred).miou < 0.4


def test_objects_of_one_colour_that_touch_are_two_and_a_malformed_one_is_one() -> None:
    for pair in (
        (("red", "circle", (6.3, 8.2, 24.0, 26.1)), ("red", "square", (22.5, 20.4, 50.2, 48.8))),
        (("green", "diamond", (5, 20, 27, 44)), ("green", "circle", (26.2, 18, 50, 42))),
        (("blue", "triangle", (10, 30.5, 34, 56)), ("blue", "square", (14, 12, 28, 32))),
    ):
        seen = detect(drawn(*pair))
        assert sorted((thing.color, str(thing.shape)) for thing in seen) == sorted((c, s) for c, s, _ in pair)
        layout = Layout("", tuple(Box(tuple(v / 64 for v in box), f"a {c} {s}") for c, s, box in pair))  # type: ignore[arg-type]
        assert measure([drawn(*pair)], [layout]).miou > 0.85
    whole = np.asarray(drawn(("red", "square", (12, 12, 52, 52)))).copy()
    for y, x in ((12, 12), (30, 40), (44, 20)):
        whole[y : y + 9, x : x + 12] = 128  # bites
    assert len(detect(Image.fromarray(whole))) == 1


def test_an_object_behind_another_keeps_its_box() -> None:
    behind, before = ("cyan", "square", (10.0, 10.0, 34.0, 34.0)), ("red", "circle", (28.0, 24.0, 54.0, 50.0))
    layout = Layout("", tuple(Box(tuple(v / 64 for v in box), f"a {c} {s}") for c, s, box in (behind, before)))  # type: ignore[arg-type]
    found = measure([drawn(behind, before)], [layout])
    assert found.miou > 0.95
    assert (found.color_acc, found.shape_acc) == (1, 1)


def test_matching_prefers_the_colour_in_near_ties_and_reports_the_pure_iou() -> None:
    layout = Layout("", (Box((0, 0, 0.5, 0.5), "a red circle"),))
    blue = Detection((0, 0, 0.5, 0.48), "blue circle", color="blue", shape="circle")
    red = Detection((0, 0, 0.5, 0.47), "red square", color="red", shape="square")
    (reading,) = match([blue, red], layout, by_label=False, attributes=True)
    assert (reading.color, reading.shape) == (True, False)
    assert reading.iou == pytest.approx(0.94)
    (reading,) = match([blue, replace(red, xyxy=(0, 0, 0.5, 0.4))], layout, by_label=False, attributes=True)
    assert (reading.color, reading.shape) == (False, True)
    (reading,) = match([replace(red, xyxy=(0.6, 0.6, 0.9, 0.9))], layout, by_label=False, attributes=True)
    assert (reading.iou, reading.color, reading.shape) == (0, False, False)


def test_arrays_images_and_sizes_mean_the_same() -> None:
    images, layouts = scenes("basic")
    some = images[:6]
    assert detect_all(np.stack([np.asarray(p) for p in some])) == detect_all(some) == [detect(p) for p in some]
    larger: list[Image.Image] = [p.resize(s, Image.Resampling.BICUBIC) for p in some for s in ((96, 64), (333, 333))]
    mixed = [image for pair in zip(some, larger[::2], larger[1::2], strict=True) for image in pair]
    found = measure(mixed, [layout for layout in layouts[:6] for _ in range(3)])
    assert found.miou > 0.97
    assert (found.color_acc, found.shape_acc) == (1, 1)
    for wrong in (np.zeros((2, 64, 64), np.uint8), np.zeros((1, 64, 64, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            detect_all(wrong)  # type: ignore[arg-type]


def test_what_measure_refuses_and_what_contributes_nothing() -> None:
    images, layouts = scenes("basic")
    with pytest.raises(ValueError, match="2 images, but 3 layouts"):
        measure(images[:2], layouts[:3])
    with pytest.raises(InputError, match="no boxes"):
        measure(images[:1], [Layout("nothing")])
    with pytest.raises(InputError, match="a sleeping cat"):
        measure(images[:1], [Layout("", (Box((0, 0, 1, 1), "a sleeping cat"),))])
    with_empty = measure([*images[:3], images[5]], [*layouts[:3], Layout("")])
    assert with_empty == measure(images[:3], layouts[:3])
    readings = per_image(images[:3], layouts[:3])
    assert [len(boxes) for boxes in readings] == [len(layout.boxes) for layout in layouts[:3]]
    assert summarise([box for boxes in readings for box in boxes]) == with_empty
    assert set(with_empty.to_dict()) == {"miou", "iou50", "color_acc", "shape_acc", "boxes"}
    assert Fidelity(**with_empty.to_dict()) == with_empty  # type: ignore[arg-type]


def test_readable() -> None:
    _, layouts = scenes("basic")
    assert readable(layouts)
    assert readable([*layouts, Layout("no boxes")])
    assert not readable([])
    assert not readable([Layout("no boxes")])
    assert not readable([*layouts, Layout("", (Box((0, 0, 1, 1), "a dog"),))])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fit_draws_as_the_generator_does(shape: str) -> None:
    box: NDArray[np.float32] = np.array([[5.25, 3.4, 27.3, 22.75]], np.float32)
    index = np.array([SHAPES.index(shape)])
    image, slopes = _render(box, index, np.array([0]), (32, 32))
    assert np.abs(image[0] - shape_coverage(shape, tuple(box[0]), 32)).mean() < 0.01
    for side in range(4):
        step = np.zeros((1, 4), np.float32)
        step[0, side] = 0.02
        change = (
            _render(box + step, index, np.array([0]), (32, 32))[0]
            - _render(box - step, index, np.array([0]), (32, 32))[0]
        ) / 0.04
        assert np.abs(change[0] - slopes[0, side]).mean() < 0.01
