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
    MissingPictureError,
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
    caption is the task's `caption`, or a text area of the whole picture.

    Raises:
        InputError: no JSON. A record: no picture, a region without a label or numbers.
    """
    return each(rows(table_files(context, ".json")), partial(_task, context=context))


def _task(row: Any, where: str, context: Context) -> Sample:
    nested = isinstance(row.get("data"), Mapping)
    data = row["data"] if nested else row
    image = _uploaded(text(need(data, "image", where), "image", where), where, context)
    caption = data.get("caption")
    things = []
    regions = list(_results(row, where) if nested else _minimal(row, where))
    size = size_of(image, where)
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
    return Sample(image, where, things, text(caption, "the caption", where) if caption else None)


def _results(row: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """(value, type, place) of the regions of the first annotation that was not cancelled."""
    done = [a for a in items_of(row, "annotations", where) if isinstance(a, Mapping) and not a.get("was_cancelled")]
    for index, result in enumerate(items_of(done[0], "result", f"{where}.annotations") if done else []):
        place = f"{where}: result[{index}]"
        value = need(result, "value", place)
        kind = str(result.get("type", ""))
        # Per-region texts describe a region that is listed by itself, and relations have no place.
        if isinstance(value, Mapping) and not ("x" in value and kind in ("textarea", "choices")):
            yield value, kind, place


def _minimal(row: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    for key, values in row.items():
        if isinstance(values, list):
            for index, value in enumerate(values):
                if isinstance(value, Mapping):
                    kind = next((name for name in _REGION_LABELS if name in value), "")
                    yield value, kind, f"{where}.{key}[{index}]"


def _label(value: Mapping[str, Any], kind: str, where: str) -> str:
    names = value.get(kind) or next((value[name] for name in _REGION_LABELS if value.get(name)), None)
    if not isinstance(names, list) or not names:
        raise InputError("the region has no label", where=where, cure="give it one, or delete it")
    return text(names[0], "the label", where)


def _region(value: Mapping[str, Any], where: str, size: tuple[int, int]) -> XYXY:
    """The upright box of a region, in percent. Turned rectangles turn clockwise about their upper left corner, in pixels."""
    if "points" in value:
        points = [_point(point, where) for point in items_of(value, "points", where)]
        if not points:
            raise InputError("the polygon has no points", where=where)
        return points_box(points)
    if "radiusX" in value:
        x, y, a, b = four([need(value, key, where) for key in ("x", "y", "radiusX", "radiusY")], where)
        return x - a, y - b, x + a, y + b
    x, y, across, down = four([need(value, key, where) for key in ("x", "y", "width", "height")], where)
    angle = math.radians(number(value.get("rotation") or 0, where))
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


def _point(point: Any, where: str) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2:
        raise InputError(f"a point is {shown(point)}", where=where, cure="give two numbers")
    return number(point[0], where), number(point[1], where)


def _uploaded(name: str, where: str, context: Context) -> Path:
    """The file of `/data/upload/1/01234567-a.jpg`, `/data/local-files/?d=folder/a.jpg`, `s3://bucket/a.jpg` or a plain name."""
    url = urlsplit(name)
    path = parse_qs(url.query).get("d", [unquote(url.path)])[0]
    try:
        return context.pictures.find(path, where)
    except MissingPictureError:
        last = path.rsplit("/", 1)[-1]
        if not _UPLOAD.match(last):
            raise
        return context.pictures.find(last[9:], where)


def read_cvat(context: Context) -> Reads:
    """Pictures of an export "CVAT for images": annotations.xml. Boxes, polygons and polylines are in pixels, from 0.

    Raises:
        InputError: no XML, or another one. A record: no picture, another size, a shape without label or numbers.
    """
    src = context.src
    path = src if src.is_file() else src / "annotations.xml"
    if not path.is_file():
        raise InputError("has no annotations.xml", where=str(src), cure="give the xml file itself, and --images")
    root = parse_xml(path)
    if root.tag != "annotations":
        raise InputError(
            f"its root is <{root.tag}>, not <annotations>", where=str(path), cure="export 'CVAT for images'"
        )
    if root.find("track") is not None:
        raise InputError("holds tracks of a video", where=str(path), cure="export 'CVAT for images', not 'for video'")
    images = [image for image in root.findall("image") if context.split in (None, image.get("subset"))]
    if not images:
        raise InputError("holds no <image>", where=str(path))
    for index, image in enumerate(images):
        yield partial(_cvat_sample, image, f"{path}: image {image.get('id', index)}", context)


def _cvat_sample(image: Element, where: str, context: Context) -> Sample:
    file = context.pictures.find(text(image.get("name"), "name", where), where)
    size = size_of(file, where, (image.get("width"), image.get("height")))
    things = []
    for index, shape in enumerate(shape for shape in image if shape.tag not in ("tag",)):
        place = f"{where}: {shape.tag} {index}"
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
    return Sample(file, where, things)


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


def _cvat_points(shape: Element, where: str) -> list[tuple[float, float]]:
    try:
        points = [(float(x), float(y)) for x, y in (p.split(",") for p in (shape.get("points") or "").split(";"))]
    except ValueError:
        raise InputError(f"points is {shown(shape.get('points'))}", where=where, cure="write x,y;x,y;...") from None
    return points
