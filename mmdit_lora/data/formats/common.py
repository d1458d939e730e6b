"""What the readers and writers of all formats share: conversion of boxes, clipping, images that lie elsewhere, counters."""

from __future__ import annotations

import math
import os
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import yaml
from PIL import Image

from mmdit_lora import files
from mmdit_lora.boxes import EDGE_RULE, Four, Reading, clip, corners, full_size, overshoot, relative, within_edge
from mmdit_lora.config.loading import parse_yaml
from mmdit_lora.data.images import image_size, load_image, opened
from mmdit_lora.data.records import Item, Warnings
from mmdit_lora.errors import InputError, shown

DEFAULT_CAPTION = "a photo of {phrases}"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")
# The upright box around a turned one or an ellipse may leave the image where the shape itself does not.
_AROUND = 0.25  # of the side

Convention = Literal["xyxy", "xywh", "cxcywh", "xxyy"]
Unit = Literal["relative", "pixel", "percent", "permille"]
Things = list[tuple[str, Four]]  # (name of the class or text of the box, relative xyxy)


class MissingImageError(InputError):
    """A record whose image is not there (`--skip-missing` leaves such records out)."""


class Sample(NamedTuple):
    """What a reader makes of one record. `caption`: the set's own; None where it has none."""

    image: Path
    location: str
    things: Things
    caption: str | None = None


# A reader yields one such call a record, so that the error of one record need not end the reading of the others.
Reads = Iterable[Callable[[], Sample]]


class RawBox(NamedTuple):
    """A box as a file states it: its place in the file, its four numbers in the set's own unit, its two texts as they are."""

    location: str
    value: Any
    short: Any = None
    long: Any = None
    around: bool = False  # the upright box around another shape, which may leave the image by up to a quarter

    def phrase(self, detailed: bool = False) -> str:
        """The text that is wanted, else the other. Raises `InputError` where both are missing."""
        first, second = (self.long, self.short) if detailed else (self.short, self.long)
        chosen = next((t for t in (first, second) if isinstance(t, str) and t.strip()), first)
        return text(chosen, "the description", self.location)


@dataclass
class Context:
    """The options of a reader, and what it notes while reading.

    Args:
        src: folder or file. split, images, detailed, bbox_format, bbox_units: the options of `read_format`.
        left_out: reason -> how often. notes: facts for `--json`. remarks: lines for people.
        warnings: what disagreed in the set, and what was taken instead.
    """

    src: Path
    split: str | None = None
    images: Path | None = None
    detailed: bool = False
    bbox_format: str | None = None
    bbox_units: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    warnings: Warnings = field(default_factory=Warnings)
    unpacked_count: int = 0

    @cached_property
    def image_finder(self) -> ImageFinder:
        """Where images are looked for: `--images` if given, else the source's folder."""
        return ImageFinder(self.images or (self.src if self.src.is_dir() else self.src.parent))

    @cached_property
    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """For images that lie inside other files; goes when the set is no longer used."""
        return tempfile.TemporaryDirectory(prefix="mmdit-lora-")

    def unpacked(self, data: Any, stem: str, location: str) -> Path:
        """A file of the bytes of an image. Raises `InputError` where these are none."""
        if isinstance(data, Mapping):  # as the Hugging Face image feature has it
            data = data.get("bytes")
        if not isinstance(data, bytes):
            raise InputError(f"its image is {type(data).__name__}, not bytes", location=location)
        try:
            with opened(data) as image:
                suffix = (image.format or "png").lower().replace("jpeg", "jpg")
        except InputError as error:
            raise InputError(f"its image cannot be read: it {error.what}", location=location, hint=error.hint) from None
        self.unpacked_count += 1
        path = Path(self.scratch.name) / f"{flat(stem)}.{suffix}"
        if path.exists():  # ids need not be unique
            path = path.with_name(f"{flat(stem)}-{self.unpacked_count}.{suffix}")
        path.write_bytes(data)
        return path

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1

    def things(
        self,
        boxes: Iterable[RawBox],
        order: Convention,
        *,
        unit: Unit = "relative",
        size: tuple[int, int] | None = None,
        image: Path | None = None,
    ) -> Things:
        """Phrases and relative boxes of what a file states; boxes without area or outside are left out. See `box`."""
        found: Things = []
        for raw in boxes:
            phrase = raw.phrase(self.detailed)
            xyxy = self.box(raw.value, order, raw.location, unit=unit, size=size, image=image, around=raw.around)
            if xyxy is not None:
                found.append((phrase, xyxy))
        return found

    def box(
        self,
        value: Any,
        order: Convention,
        location: str,
        *,
        unit: Unit = "relative",
        size: tuple[int, int] | None = None,
        image: Path | None = None,
        around: bool = False,
    ) -> Four | None:
        """The box as relative xyxy, clipped to the image (which is counted); None, and counted, where nothing is left of it.

        Args:
            value: four numbers in `order` ("xxyy": left, right, top, bottom).
            size: (width, height) of the image, for boxes in pixels; for others, where it is at hand.
            image: the image, whose size is read where it decides whether a relative box is clipped.
            around: whether the box is that around another shape, which may leave the image by up to a quarter.

        Raises:
            InputError: not four finite numbers, inverted, or outside the image by more than `EDGE_RULE` says.
        """
        numbers = four(value, location)
        left, top, right, bottom = corners(numbers, order)
        if right < left or bottom < top:
            what = f"the box {list(numbers)} is inverted as {order}"
            raise InputError(what, location=location, hint="swap min and max")
        if right == left or bottom == top:
            self.leave_out("boxes without area")
            return None
        xyxy = relative(numbers, Reading(order, unit), size)
        by = max(overshoot(xyxy))
        if size is None and image is not None and not within_edge(xyxy, None) and by <= _AROUND:
            size = size_of(image, location)
        if not within_edge(xyxy, size) and not (around and by <= _AROUND):
            width, height = full_size(unit, size)
            sides = f"of {width} x {height} pixels" if unit == "pixel" else f"(sides from 0 to {width})"
            raise InputError(
                f"the box {[round(v, 3) for v in numbers]} leaves the image {sides}",
                location=location,
                hint=f"check that the annotation belongs to this image, and to this size of it ({EDGE_RULE})",
            )
        left, top, right, bottom = inner = clip(xyxy)
        if left < right and top < bottom:
            self.warnings.clipped(by, location)
            return inner
        self.leave_out("boxes outside their image")
        return None


class ImageFinder:
    """Finds images below folders by the names that annotations give, which are often stale paths of other machines."""

    def __init__(self, *roots: Path) -> None:
        self.roots = roots

    def find(self, name: str, location: str) -> Path:
        """The file of that relative path; else of that file name, with any suffix, anywhere below the folders.

        Raises:
            MissingImageError: there is none.
            InputError: there are several, in different folders.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        parts = tuple(part for part in parts if part not in ("/", "..") and not part.endswith(":"))
        for root in self.roots:
            for start in range(len(parts)):
                if is_file(path := root.joinpath(*parts[start:])):
                    return path
        last = parts[-1] if parts else ""
        found = self._below.get(last) or self._below.get(Path(last).stem) or []
        if len(found) > 1:
            what = f"its image {last!r} exists {len(found)} times ({found[0]}, {found[1]})"
            raise InputError(what, location=location, hint="give the folder that is meant with --images")
        if not found:
            raise MissingImageError(
                f"its image {shown(name)} is not below {', '.join(map(str, self.roots))}",
                location=location,
                hint="give the images' folder with --images, or leave such records out with --skip-missing",
            )
        return found[0]

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = {}
        for root in self.roots:
            for folder, _, names in sorted(os.walk(root)):
                for name in sorted(names):
                    if name.endswith(SUFFIXES):
                        for key in {name, Path(name).stem}:
                            index.setdefault(key, []).append(Path(folder) / name)
        return index


def is_file(path: Path) -> bool:
    """As `Path.is_file`, with no exception for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def four(value: Any, location: str) -> Four:
    """Four finite numbers. Raises `InputError` for anything else."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != 4:
        raise InputError(f"the box is {shown(value)}", location=location, hint="give four numbers")
    a, b, c, d = (number(v, location) for v in value)
    return a, b, c, d


def number(value: Any, location: str) -> float:
    """A finite number, from a number or its text. Raises `InputError` for anything else."""
    try:
        result = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"{shown(value)} is no finite number", location=location, hint="give a number")
    return result


def text(value: Any, what: str, location: str) -> str:
    """A text that is not blank, stripped. Raises `InputError` for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is {shown(value)}", location=location, hint="give a text")
    return value.strip()


def need(row: Any, key: str, location: str) -> Any:
    """`row[key]`. Raises `InputError` where `row` is no object or has no such key, saying what it has."""
    if not isinstance(row, Mapping):
        raise InputError(f"is {type(row).__name__}, not an object with {key!r}", location=location)
    if row.get(key) is None:
        raise InputError(f"{key!r} is missing (found: {', '.join(map(str, row)) or 'nothing'})", location=location)
    return row[key]


def need_text(row: Any, key: str, location: str) -> str:
    """`row[key]`, a text that is not blank, stripped. Raises `InputError`."""
    return text(need(row, key, location), key, location)


def items_of(row: Any, key: str, location: str) -> list[Any]:
    """`row[key]`, a list. Raises `InputError` where it is none."""
    value = need(row, key, location)
    if not isinstance(value, list):
        raise InputError(f"{key} is {type(value).__name__}, not a list", location=location)
    return value


def key_of(row: Any, key: str, location: str) -> int | str:
    """`row[key]`, a number or a text that identifies something. Raises `InputError` for anything else."""
    value = need(row, key, location)
    if not isinstance(value, int | str):
        raise InputError(f"{key} is {type(value).__name__}, not a number", location=location)
    return value


def points_box(points: Sequence[Sequence[float]]) -> Four:
    """The upright box (left, top, right, bottom) around points, in their units."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def size_of(image: Path, location: str, stated: tuple[Any, Any] | None = None) -> tuple[int, int]:
    """(width, height) of the upright image in pixels.

    Args:
        stated: the size that the annotation states. 0 and None state nothing (some tools write 0 x 0).

    Raises:
        InputError: no readable image, or one of another size than was stated.
    """
    try:
        size = image_size(image)
    except InputError as error:
        raise error.at(location) from None
    if stated is not None and None not in stated:
        width, height = (number(v, location) for v in stated)
        if 0 not in (width, height) and (width, height) != size:
            raise InputError(
                f"says {width:g} x {height:g} pixels, the image has {size[0]} x {size[1]} (upright)"
                f"{': width and height are swapped' if (height, width) == size else ''}",
                location=location,
                hint="annotate the image as it is, or remove the size if the boxes are right",
            )
    return size


def stated_size(image: Path, stated: tuple[Any, Any], location: str) -> tuple[int, int]:
    """The size (width, height) that boxes in pixels refer to, where a set is often stored at another size than it was annotated.

    Raises:
        InputError: no size, no readable image, or one of another shape (by more than two pixels' worth of rounding).
    """
    width, height = (number(v, f"{location}: size") for v in stated)
    if width <= 0 or height <= 0:
        what = f"says {width:g} x {height:g} pixels"
        raise InputError(what, location=location, hint="give the size that the boxes refer to")
    real = size_of(image, location)
    if abs(real[0] * height - real[1] * width) > 2 * max(width, height, *real):
        raise InputError(
            f"says {width:g} x {height:g} pixels, the image has {real[0]} x {real[1]} (upright), another shape",
            location=location,
            hint="check that the annotation belongs to this image",
        )
    return int(width), int(height)


def read_text(path: Path, *, limit: int = 256 * 2**20) -> str:
    """The text of a file, see `files.read_text`. Raises `InputError` where it cannot be read."""
    return files.read_text(path, what="annotation file", limit=limit)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of at most 64 MiB. Raises `InputError` with file and line."""
    content = read_text(path, limit=64 * 2**20)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return parse_yaml(content, location=str(path), unique=False, loader=loader)[0]


def require_folder(src: Path, hint: str) -> None:
    if not src.is_dir():
        raise InputError("no such folder", location=str(src), hint=hint)


def check_caption(template: str) -> None:
    """Refuse a caption template with another placeholder than `{phrases}`. Raises `InputError`."""
    hint = "the one placeholder is {phrases}; write {{ and }} for braces"
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        what = f"the caption template {template!r} is wrong: {error}"
        raise InputError(what, location="--caption", hint=hint) from None
    for _, name, spec, conversion in fields:
        if name != "phrases" or spec or conversion:
            raise InputError(f"the caption template has the placeholder {{{name}}}", location="--caption", hint=hint)
    if not template.strip():
        raise InputError("the caption template is empty", location="--caption", hint=hint)


def flat(name: str) -> str:
    """A file name without folders."""
    return "_".join(PurePosixPath(name.replace("\\", "/")).parts).replace("/", "_").lstrip("._") or "image"


def put_image(image: Image.Image | Path, target: Path) -> tuple[int, int]:
    """Copy or save an image, after decoding it, so that no damaged one is passed on; (width, height), upright."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Path):
        size = load_image(image).size
        shutil.copyfile(image, target)
        return size
    image.save(target)
    return image.size


def unique(items: Iterable[Item], kind: str, *, by_stem: bool = True) -> list[Item]:
    """The items, for formats that hold one layout an image.

    Args:
        by_stem: whether the format names what belongs to an image by the image's name without extension.

    Raises:
        InputError: a name stands twice.
    """
    items = list(items)
    for name, count in Counter(item[0] for item in items).items():
        if count > 1:
            what = f"{kind} holds one layout an image, and {name!r} has {count}"
            raise InputError(what, hint="use --to jsonl or coco")
    for stem, count in Counter(str(PurePosixPath(item[0]).with_suffix("")) for item in items).items():
        if by_stem and count > 1:
            what = f"{kind} names images by their stem, and {stem!r} stands twice"
            raise InputError(what, hint="use --to jsonl or coco")
    return items
