"""Exports of annotation tools: Label Studio (JSON, JSON_MIN) and CVAT (XML for images)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import Element

from mmdit_lora.data.formats.common import (
    XYXY,
    Context,
    MissingImageError,
    Reads,
    Sample,
    four,
    items_of,
    need,
    number,
    points_box,
    size_of,
    text,
)
from mmdit_lora.data.formats.tables import each, rows, table_files
from mmdit_lora.data.formats.xml import attribute_number, parse_xml
from mmdit_lora.errors import InputError, shown

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploaded files
_REGION_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")


def read_label_studio(context: Context) -> Reads:
    """Tasks of a Label Studio export: JSON (with `annotations`) or JSON_MIN (labels as columns). Boxes are in percent.

    Rectangles, turned ones by the upright box around them, ellipses and polygons are read; brushes are left out. The
    caption is the task's `caption`, or a text area of the whole image.

    Raises:
        InputError: no JSON. A record: no image, a region without a label or numbers.
    """
    return each(rows(table_files(context, ".json")), partial(_task, context=context))


def _task(row: Any, location: str, context: Context) -> Sample:
    nested = isinstance(row.get("data"), Mapping)
    data = row["data"] if nested else row
    image = _uploaded(text(need(data, "image", location), "image", location), location, context)
    caption = data.get("caption")
    things = []
    regions = list(_results(row, location) if nested else _minimal(row, location))
    size = size_of(image, location)
    for value, kind, place in regions:
        if kind in ("textarea", "choices"):
            texts = value.get("text")
            caption = caption or (" ".join(map(str, texts)) if isinstance(texts, list) else texts)
            continue
        if kind.startswith("brush") or "rle" in value:
            context.leave_out("brush strokes")
            continue
        label = _label(value, kind, place)
        around = bool(value.get("rotation")) or "radiusX" in value
        box = context.box(_region(value, place, size), "xyxy", place, unit="percent", size=size, around=around)
        if box is not None:
            things.append((label, box))
    return Sample(image, location, things, text(caption, "the caption", location) if caption else None)


def _results(row: Any, location: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """(value, type, place) of the regions of the first annotation that was not cancelled."""
    done = [a for a in items_of(row, "annotations", location) if isinstance(a, Mapping) and not a.get("was_cancelled")]
    for index, result in enumerate(items_of(done[0], "result", f"{location}.annotations") if done else []):
        place = f"{location}: result[{index}]"
        value = need(result, "value", place)
        kind = str(result.get("type", ""))
        # Per-region texts describe a region that is listed by itself, and relations have no place.
        if isinstance(value, Mapping) and not ("x" in value and kind in ("textarea", "choices")):
            yield value, kind, place


def _minimal(row: Any, location: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    for key, values in row.items():
        if isinstance(values, list):
            for index, value in enumerate(values):
                if isinstance(value, Mapping):
                    kind = next((name for name in _REGION_LABELS if name in value), "")
                    yield value, kind, f"{location}.{key}[{index}]"


def _label(value: Mapping[str, Any], kind: str, location: str) -> str:
    names = value.get(kind) or next((value[name] for name in _REGION_LABELS if value.get(name)), None)
    if not isinstance(names, list) or not names:
        raise InputError("the region has no label", location=location, hint="give it one, or delete it")
    return text(names[0], "the label", location)


def _region(value: Mapping[str, Any], location: str, size: tuple[int, int]) -> XYXY:
    """The upright box of a region, in percent. Turned rectangles turn clockwise about their upper left corner, in pixels."""
    if "points" in value:
        points = [_point(point, location) for point in items_of(value, "points", location)]
        if not points:
            raise InputError("the polygon has no points", location=location)
        return points_box(points)
    if "radiusX" in value:
        x, y, a, b = four([need(value, key, location) for key in ("x", "y", "radiusX", "radiusY")], location)
        return x - a, y - b, x + a, y + b
    x, y, across, down = four([need(value, key, location) for key in ("x", "y", "width", "height")], location)
    angle = math.radians(number(value.get("rotation") or 0, location))
    if not angle:
        return x, y, x + across, y + down
    aspect = size[0] / size[1]
    corners = [(0.0, 0.0), (across, 0.0), (0.0, down), (across, down)]
    return points_box(
        [
            (
                x + u * math.cos(angle) - v / aspect * math.sin(angle),
                y + u * aspect * math.sin(angle) + v * math.cos(angle),
            )
            for u, v in corners
        ]
    )


def _point(point: Any, location: str) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2:
        raise InputError(f"a point is {shown(point)}", location=location, hint="give two numbers")
    return number(point[0], location), number(point[1], location)


def _uploaded(name: str, location: str, context: Context) -> Path:
    """The file of `/data/upload/1/01234567-a.jpg`, `/data/local-files/?d=folder/a.jpg`, `s3://bucket/a.jpg` or a plain name."""
    url = urlsplit(name)
    path = parse_qs(url.query).get("d", [unquote(url.path)])[0]
    try:
        return context.image_finder.find(path, location)
    except MissingImageError:
        last = path.rsplit("/", 1)[-1]
        if not _UPLOAD.match(last):
            raise
        return context.image_finder.find(last[9:], location)


def read_cvat(context: Context) -> Reads:
    """Images of an export "CVAT for images": annotations.xml. Boxes, polygons and polylines are in pixels, from 0.

    Raises:
        InputError: no XML, or another one. A record: no image, another size, a shape without label or numbers.
    """
    src = context.src
    path = src if src.is_file() else src / "annotations.xml"
    if not path.is_file():
        raise InputError("has no annotations.xml", location=str(src), hint="give the xml file itself, and --images")
    root = parse_xml(path)
    if root.tag != "annotations":
        raise InputError(
            f"its root is <{root.tag}>, not <annotations>", location=str(path), hint="export 'CVAT for images'"
        )
    if root.find("track") is not None:
        raise InputError(
            "holds tracks of a video", location=str(path), hint="export 'CVAT for images', not 'for video'"
        )
    images = [image for image in root.findall("image") if context.split in (None, image.get("subset"))]
    if not images:
        raise InputError("holds no <image>", location=str(path))
    for index, image in enumerate(images):
        yield partial(_cvat_sample, image, f"{path}: image {image.get('id', index)}", context)


def _cvat_sample(image: Element, location: str, context: Context) -> Sample:
    file = context.image_finder.find(text(image.get("name"), "name", location), location)
    size = size_of(file, location, (image.get("width"), image.get("height")))
    things = []
    for index, shape in enumerate(shape for shape in image if shape.tag not in ("tag",)):
        place = f"{location}: {shape.tag} {index}"
        if shape.tag == "box":
            corners = tuple(attribute_number(shape, name, place) for name in ("xtl", "ytl", "xbr", "ybr"))
            pixels = _turned(corners, attribute_number(shape, "rotation", place) if shape.get("rotation") else 0)
        elif shape.tag in ("polygon", "polyline"):
            pixels = points_box(_cvat_points(shape, place))
        else:
            context.leave_out(f"shapes of the kind {shape.tag}")
            continue
        label = text(shape.get("label"), "label", place)
        box = context.box(pixels, "xyxy", place, unit="pixel", size=size, around=bool(shape.get("rotation")))
        if box is not None:
            things.append((label, box))
    return Sample(file, location, things)


def _turned(corners: tuple[float, ...], degrees: float) -> tuple[float, ...]:
    """The upright box around a box that is turned about its middle."""
    left, top, right, bottom = corners
    if not degrees or right < left or bottom < top:
        return corners
    angle = math.radians(degrees)
    across, down = right - left, bottom - top
    half_x = (across * abs(math.cos(angle)) + down * abs(math.sin(angle))) / 2
    half_y = (across * abs(math.sin(angle)) + down * abs(math.cos(angle))) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half_x, y - half_y, x + half_x, y + half_y


def _cvat_points(shape: Element, location: str) -> list[tuple[float, float]]:
    try:
        points = [(float(x), float(y)) for x, y in (p.split(",") for p in (shape.get("points") or "").split(";"))]
    except ValueError:
        raise InputError(
            f"points is {shown(shape.get('points'))}", location=location, hint="write x,y;x,y;..."
        ) from None
    return points
