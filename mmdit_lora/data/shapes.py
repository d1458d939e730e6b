"""Procedural scenes: coloured shapes on grey backgrounds, with captions, boxes and phrases.

Every image is a function of (spec, seed, index), so a data set is a few numbers, and what was asked for can be read
back from the pixels exactly (`mmdit_lora.evaluation.detectors.shapes`), without a learned detector. As a data set they are
written to a folder (`write_dataset`), or named by `shapes://DOMAIN?count=N&seed=S` (`open_scenes`) and generated when needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image

from mmdit_lora.boxes import Four
from mmdit_lora.config.ranges import SEED, Range
from mmdit_lora.data.records import Record
from mmdit_lora.data.records import write_dataset as write_records
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.layout import Box, Layout

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 45),
    "green": (35, 165, 65),
    "cyan": (45, 205, 220),
    "blue": (35, 75, 215),
    "purple": (135, 50, 195),
    "pink": (250, 120, 195),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
# Grey levels, so that any colour that is seen belongs to a shape.
BACKGROUNDS: dict[str, tuple[int, int]] = {"light": (222, 248), "grey": (108, 150), "dark": (12, 50)}
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LISTED_IN_CAPTION = 4  # a longer list would not fit into a CLIP text encoder's tokens together with the rest

SCHEME = "shapes://"
# Layouts are drawn when the set is opened: half a millisecond each.
_QUERY = {"count": Range(1, 1_000_000, whole=True), "seed": SEED}
_SUPERSAMPLING = 4  # sub-pixels a side; 17 levels of edge coverage


@dataclass(frozen=True)
class SceneSpec:
    """A domain of scenes. Lengths are in pixels.

    Args:
        objects: fewest and most objects in an image.
        side: smallest and largest geometric mean of an object's sides.
        elongation: range of the ratio of the long to the short side; which of them is horizontal is drawn.
        max_overlap: the largest share of the smaller of two boxes that another one may cover; 0 = apart by `gap`.
        gap: distance kept between boxes that may not overlap.
        fill: the largest share of the image that all boxes together take; sides shrink to meet it.
        many: probability that an image holds more than `LISTED_IN_CAPTION` objects; None = every number is as likely.
        graded: probability of a background with a gradient.
        size: width and height of the image.
    """

    objects: tuple[int, int] = (1, 4)
    side: tuple[float, float] = (14, 32)
    elongation: tuple[float, float] = (1.0, 1.25)
    max_overlap: float = 0.0
    gap: float = 1.5
    fill: float = 0.6
    many: float | None = None
    graded: float = 0.5
    size: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.objects[0] <= self.objects[1] < len(NUMBER_WORDS):
            raise InputError(f"objects is {self.objects}", hint=f"give 1 to {len(NUMBER_WORDS) - 1}, fewest first")


DOMAINS: dict[str, SceneSpec] = {
    "basic": SceneSpec(),
    # What the embedded base is trained on: every number of objects, most of them few and large, a few that overlap.
    "mixed": SceneSpec(objects=(1, 10), side=(9, 32), elongation=(1.0, 1.3), max_overlap=0.1, gap=1, many=0.3),
    "dense": SceneSpec(objects=(6, 10), side=(8, 14), gap=1),
    # Few and small, well apart: what a base may learn from captions alone.
    "sparse": SceneSpec(side=(13, 22), gap=5),
    # Banners and columns, as on a page or a poster: longer and larger than anything in "mixed".
    "page": SceneSpec(objects=(2, 3), side=(20, 34), elongation=(2.0, 5.0), gap=1, fill=0.8),
}


def shape_coverage(shape: str, xyxy: Four, size: int) -> NDArray[np.float64]:
    """How much of each pixel the shape covers, (size, size) in [0, 1]; its ink touches all four sides of the box.

    Args:
        shape: one of `SHAPES`.
        xyxy: the box in pixels, sub-pixel exact.
    """
    x0, y0, x1, y1 = xyxy
    left, top = max(int(x0), 0), max(int(y0), 0)
    right, bottom = min(int(np.ceil(x1)), size), min(int(np.ceil(y1)), size)
    out = np.zeros((size, size))
    if right <= left or bottom <= top:
        return out
    steps = _SUPERSAMPLING
    x = (np.arange((right - left) * steps) + 0.5) / steps + left
    y = (np.arange((bottom - top) * steps) + 0.5) / steps + top
    u = (2 * x - x0 - x1)[None, :] / (x1 - x0)  # the box is [-1, 1] x [-1, 1]
    v = (2 * y - y0 - y1)[:, None] / (y1 - y0)
    ink = _inside(shape, u, v) & (np.abs(u) <= 1) & (np.abs(v) <= 1)
    cells = ink.reshape(bottom - top, steps, right - left, steps)
    out[top:bottom, left:right] = cells.mean(axis=(1, 3))
    return out


def make_scene(spec: SceneSpec, seed: int, index: int) -> tuple[Image.Image, Layout]:
    """Scene number `index` of the series `seed`: an RGB image and its layout. The same arguments give the same bytes."""
    layout, pixels, gradient = _draw(spec, seed, index)
    canvas = _background(spec, *gradient)
    for box, xyxy in zip(layout.boxes, pixels, strict=True):
        _, color, shape = box.phrase.split()
        coverage = shape_coverage(shape, xyxy, spec.size)[..., None]
        canvas = canvas * (1 - coverage) + np.array(COLORS[color]) * coverage
    return Image.fromarray(np.round(canvas).astype(np.uint8), mode="RGB"), layout


def make_layout(spec: SceneSpec, seed: int, index: int) -> Layout:
    """The layout that `make_scene` gives; nothing is painted."""
    return _draw(spec, seed, index)[0]


def _draw(spec: SceneSpec, seed: int, index: int) -> tuple[Layout, list[Four], tuple[float, float, float]]:
    """All that is random in a scene: its layout, the boxes in pixels, and the background (see `_background`)."""
    rng = default_rng([seed, index])
    pixels = _place(spec, rng, _count(spec, rng))
    tone = str(rng.choice(list(BACKGROUNDS)))
    start, end = rng.uniform(*BACKGROUNDS[tone], 2)
    end = end if rng.random() < spec.graded else start
    angle = rng.uniform(0, 2 * np.pi)
    touching = replace(spec, max_overlap=0)
    boxes: list[Box] = []
    for place, xyxy in enumerate(pixels):
        # Where two of one colour meet, no eye could tell where one ends.
        near = {boxes[n].phrase.split()[1] for n in range(place) if not _apart(touching, xyxy, pixels[n])}
        color = str(rng.choice([name for name in COLORS if name not in near]))
        phrase = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {rng.choice(SHAPES)}"
        left, top, right, bottom = (value / spec.size for value in xyxy)
        boxes.append(Box((left, top, right, bottom), phrase))
    return Layout(_caption(boxes, tone), tuple(boxes)), pixels, (start, end, angle)


def phrase_attributes(phrase: str) -> tuple[str, str] | None:
    """(colour, shape) of a phrase like "a red circle"; None if it is not one of ours."""
    words = phrase.split()
    if len(words) == 3 and words[0] in ("a", "an") and words[1] in COLORS and words[2] in SHAPES:
        return words[1], words[2]
    return None


def write_dataset(out: str | Path, spec: SceneSpec, *, count: int, seed: int, verb: str = "write_dataset") -> None:
    """Write `count` scenes as a data set folder (`metadata.jsonl` and PNG files), all or nothing.

    Raises:
        InputError: `count` is below 1 or `seed` negative, or `out` holds something else than a data set.
    """
    if count < 1:
        raise InputError(f"the number of images is {count}", hint="make at least one")
    if seed < 0:
        raise InputError(f"the seed is {seed}", hint="give a seed of 0 or more")

    def items() -> Iterator[tuple[str, Image.Image, Layout]]:
        for index in range(count):
            yield _file_name(index), *make_scene(spec, seed, index)

    write_records(out, items(), verb=verb)


@dataclass(frozen=True, slots=True)
class SceneRecord(Record):
    """A scene as a record; its image is painted when it is needed (about a millisecond, so it is not cached).

    Args:
        domain: key of `DOMAINS`. seed, index: as of `make_scene`.
    """

    domain: str = "basic"
    seed: int = 0
    index: int = 0

    @property
    def file(self) -> None:
        return None

    @property
    def stamp(self) -> str:
        return f"{self.domain} {self.seed} {self.index}"

    def load(self) -> Image.Image:
        return make_scene(DOMAINS[self.domain], self.seed, self.index)[0]

    def read_bytes(self) -> bytes:
        file = BytesIO()
        self.load().save(file, "PNG")
        return file.getvalue()

    def size(self) -> tuple[int, int]:
        return (DOMAINS[self.domain].size,) * 2


def is_scenes(path: object) -> bool:
    """Whether a data set's path names scenes that are generated: `shapes://...`."""
    return str(path).startswith(SCHEME)


def open_scenes(url: str) -> list[Record]:
    """The records of `shapes://DOMAIN?count=N&seed=S`: the images that `data make shapes` writes for the same numbers, under
    the same names. `seed` may be left out (0).

    Raises:
        InputError: an unknown domain or key, or a number that is missing, given twice or out of range.
    """
    domain, _, query = url.removeprefix(SCHEME).partition("?")
    if domain not in DOMAINS:
        hint = (unknown_key(domain, DOMAINS).hint or "").replace("keys", "domains")
        raise InputError(f"there is no domain {shown(domain)} of scenes", location=url, hint=hint)
    values: dict[str, int] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in _QUERY:
            raise unknown_key(key, _QUERY, location=url)
        if key in values:
            raise InputError(f"gives {key} twice", location=url, hint="keep one of the two")
        number = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text
        values[key] = _QUERY[key].check(number, f"{url}: {key}")
    if "count" not in values:
        raise InputError(
            "does not say how many scenes", location=url, hint=f"write {SCHEME}{domain}?count=2000&seed=11"
        )
    seed = values.get("seed", 0)
    return [
        SceneRecord(
            Path(f"shapes:{domain}", f"seed-{seed}", _file_name(index)),
            make_layout(DOMAINS[domain], seed, index),
            f"{url}: scene {index}",
            domain=domain,
            seed=seed,
            index=index,
        )
        for index in range(values["count"])
    ]


def _file_name(index: int) -> str:
    return f"{index:06d}.png"


def _inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.ones(np.broadcast_shapes(u.shape, v.shape), dtype=bool)
        case "triangle":  # the tip on top
            return np.abs(u) <= (v + 1) / 2
        case "diamond":
            return np.abs(u) + np.abs(v) <= 1
        case "cross":
            return (np.abs(u) <= 1 / 3) | (np.abs(v) <= 1 / 3)
    raise ValueError(f"unknown shape {shape!r}: known are {', '.join(SHAPES)}")


def _count(spec: SceneSpec, rng: Generator) -> int:
    low, high = spec.objects
    if spec.many is None:
        return int(rng.integers(low, high + 1))
    if rng.random() < spec.many:
        return int(rng.integers(LISTED_IN_CAPTION + 1, high + 1))
    return int(rng.integers(low, LISTED_IN_CAPTION + 1))


def _place(spec: SceneSpec, rng: Generator, count: int) -> list[Four]:
    """Boxes in pixels that keep the spec; sides shrink a little each time that a drawn set finds no room.

    Raises:
        InputError: they find none at their smallest either.
    """
    low, high = spec.side
    side = rng.uniform(low, high, count)
    room = spec.fill * spec.size**2
    side = np.maximum(side * min(1.0, np.sqrt(room / (side**2).sum())), low)
    ratio = np.sqrt(np.exp(rng.uniform(math.log(spec.elongation[0]), math.log(spec.elongation[1]), count)))
    upright = rng.random(count) < 0.5
    width, height = side * np.where(upright, 1 / ratio, ratio), side * np.where(upright, ratio, 1 / ratio)
    longest = spec.size - 2.0
    width, height = np.minimum(width, longest), np.minimum(height, longest)
    order = np.argsort(-width * height)  # large ones first: small ones still find room among them
    for _ in range(200):
        boxes: list[Four] = []
        for index in order:
            w, h = float(width[index]), float(height[index])
            for _ in range(60):
                x, y = rng.uniform(1, spec.size - 1 - w), rng.uniform(1, spec.size - 1 - h)
                box = (x, y, x + w, y + h)
                if all(_apart(spec, box, other) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == count:
            return boxes
        smallest = np.minimum(low / np.where(ratio > 1, ratio, 1), np.minimum(width, height))
        shrink = np.maximum(0.95, smallest / np.minimum(width, height))
        width, height = width * shrink, height * shrink
    raise InputError(
        f"{count} objects of sides {spec.side} find no room in {spec.size} px", hint="ask for fewer or smaller"
    )


def _apart(spec: SceneSpec, a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    gap = 0.0 if spec.max_overlap else spec.gap
    across = min(a[2], b[2]) - max(a[0], b[0]) + gap
    down = min(a[3], b[3]) - max(a[1], b[1]) + gap
    if across <= 0 or down <= 0:
        return True
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return across * down <= spec.max_overlap * smaller


def _background(spec: SceneSpec, start: float, end: float, angle: float) -> NDArray[np.float64]:
    """(size, size, 3), achromatic: a linear gradient between two grey levels."""
    axis = np.linspace(-0.5, 0.5, spec.size)
    slope = axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)
    grey = start + (end - start) * (slope / (np.abs(np.cos(angle)) + np.abs(np.sin(angle))) + 0.5)
    return np.repeat(grey[..., None], 3, axis=2)


def _caption(boxes: list[Box], tone: str) -> str:
    location = f"on a {tone} background"
    phrases = [box.phrase for box in boxes]
    if len(phrases) > LISTED_IN_CAPTION:
        return f"{NUMBER_WORDS[len(phrases)]} shapes {location}"
    return f"{join_phrases(phrases)} {location}"


def join_phrases(phrases: Sequence[str]) -> str:
    """ "a cat", "a cat and a dog", "a cat, a dog and a cow"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
