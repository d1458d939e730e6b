"""What tools for annotation and training write: Label Studio's exports, SimpleTuner's `.bbox` files, ComfyUI's bounding boxes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from mmdit_lora.boxes import Four
from mmdit_lora.data.formats.common import (
    SUFFIXES,
    Context,
    MissingImageError,
    RawBox,
    Reads,
    Sample,
    Things,
    four,
    items_of,
    need,
    need_text,
    number,
    points_box,
    put_image,
    read_text,
    require_folder,
    size_of,
    text,
    unique,
)
from mmdit_lora.data.formats.tables import each, rows, table_files
from mmdit_lora.data.formats.yolo import class_line, class_names
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import json_text
from mmdit_lora.json_files import numbered_lines, parse_json, read_json

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploaded files
_REGION_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
_TEXTS = ("textarea", "choices")

Region = tuple[Mapping[str, Any], str, str]  # (value, type, place)


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
    image = _uploaded(need_text(data, "image", location), location, context)
    regions = list(_results(row, location) if nested else _minimal(row, location))
    texts = [value.get("text") for value, kind, _ in regions if kind in _TEXTS]
    texts = [" ".join(map(str, one)) if isinstance(one, list) else one for one in texts]
    caption = next((one for one in (data.get("caption"), *texts) if one), None)
    size = size_of(image, location)

    def boxes() -> Iterator[RawBox]:
        for value, kind, place in regions:
            if kind in _TEXTS:
                continue
            if kind.startswith("brush") or "rle" in value:
                context.leave_out("brush strokes")
                continue
            labels = value.get(kind) or next((value[name] for name in _REGION_LABELS if value.get(name)), None)
            if not isinstance(labels, list) or not labels:
                raise InputError("the region has no label", location=place, hint="give it one, or delete it")
            around = bool(value.get("rotation")) or "radiusX" in value
            yield RawBox(place, _region(value, place, size), text(labels[0], "the label", place), around=around)

    things = context.things(boxes(), "xyxy", unit="percent", size=size)
    return Sample(image, location, things, text(caption, "the caption", location) if caption else None)


def _results(row: Any, location: str) -> Iterator[Region]:
    """The regions of the first annotation that was not cancelled."""
    done = [a for a in items_of(row, "annotations", location) if isinstance(a, Mapping) and not a.get("was_cancelled")]
    for index, result in enumerate(items_of(done[0], "result", f"{location}.annotations") if done else []):
        place = f"{location}: result[{index}]"
        value = need(result, "value", place)
        kind = str(result.get("type", ""))
        # Per-region texts describe a region that is listed by itself, and relations have no place.
        if isinstance(value, Mapping) and not ("x" in value and kind in _TEXTS):
            yield value, kind, place


def _minimal(row: Any, location: str) -> Iterator[Region]:
    for key, values in row.items():
        for index, value in enumerate(values if isinstance(values, list) else ()):
            if isinstance(value, Mapping):
                kind = next((name for name in _REGION_LABELS if name in value), "")
                yield value, kind, f"{location}.{key}[{index}]"


def _region(value: Mapping[str, Any], location: str, size: tuple[int, int]) -> Four:
    """The upright box of a region, in percent. Turned rectangles turn clockwise about their upper left corner, in pixels."""
    if "points" in value:
        points = [_point(point, location) for point in items_of(value, "points", location)]
        if not points:
            raise InputError("the polygon has no points", location=location)
        return points_box(points)
    keys = ("x", "y", "radiusX", "radiusY") if "radiusX" in value else ("x", "y", "width", "height")
    x, y, across, down = four([need(value, key, location) for key in keys], location)
    if "radiusX" in value:
        return x - across, y - down, x + across, y + down
    angle = math.radians(number(value.get("rotation") or 0, location))
    if not angle:
        return x, y, x + across, y + down
    aspect, cos, sin = size[0] / size[1], math.cos(angle), math.sin(angle)
    corners = [(0.0, 0.0), (across, 0.0), (0.0, down), (across, down)]
    return points_box([(x + u * cos - v / aspect * sin, y + u * aspect * sin + v * cos) for u, v in corners])


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


def read_simpletuner(context: Context) -> Reads:
    """Images with a `.bbox` beside them: a JSON list or JSON lines of {"label", "bbox"} (xyxy, relative), or YOLO lines.

    YOLO lines need classes.txt or data.yaml in the folder. The caption is the `.txt` beside the image.

    Raises:
        InputError: no `.bbox` file. A record: it is none of these, or its image is missing.
    """
    require_folder(context.src, "give the folder of the images and their .bbox files")
    found = sorted(context.src.rglob("*.bbox"))
    if not found:
        raise InputError("holds no .bbox file", location=str(context.src))
    for path in found:
        yield partial(_simpletuner, path, context)


def write_simpletuner(folder: Path, items: Iterable[Item]) -> None:
    """Write each image, its `.bbox` (a JSON list) and its caption in a `.txt` side by side."""
    for name, image, layout in unique(items, "SimpleTuner"):
        path = folder / name
        put_image(image, path)
        entities = [{"label": box.phrase, "bbox": list(box.xyxy)} for box in layout.boxes]
        path.with_suffix(".bbox").write_text(json_text(entities, indent=2), encoding="utf-8")
        path.with_suffix(".txt").write_text(layout.caption, encoding="utf-8")


def _simpletuner(path: Path, context: Context) -> Sample:
    image, content = _beside(path, context), read_text(path)
    lines = [(f"{path}:{line_number}", line) for line_number, line in numbered_lines(content)]
    first = content.lstrip()[:1]
    things: Things
    if first in ("[", "{"):
        if first == "[":
            entities = ((f"{path}[{n}]", entity) for n, entity in enumerate(parse_json(content, location=str(path))))
        else:
            entities = ((place, parse_json(line, location=place)) for place, line in lines)
        boxes = (RawBox(place, need(e, "bbox", place), need_text(e, "label", place)) for place, e in entities)
        things = context.things(boxes, "xyxy", image=image)
    else:
        names = class_names(context.src) if lines else {}
        things = [t for place, line in lines if (t := class_line(line, names, place, context, image)) is not None]
    return Sample(image, str(path), things, _caption_beside(image, path))


def read_comfyui(context: Context) -> Reads:
    """Images with a `.json` beside them (or one file for one image): what "Create Bounding Boxes" gives, {"x", "y",
    "width", "height"} in pixels from 0, in one list or a list of frames.

    The phrase is `label`, or `desc` or `name` of `metadata`. The caption is the `.txt` beside the image.

    Raises:
        InputError: no such file. A record: another structure, no image, several frames with boxes.
    """
    src = context.src
    found = [src] if src.is_file() else sorted(src.rglob("*.json"))
    if not found:
        raise InputError("no such file, or no .json in the folder", location=str(src))
    for path in found:
        yield partial(_comfyui, path, context)


def _comfyui(path: Path, context: Context) -> Sample:
    data = read_json(path)
    if not isinstance(data, list):
        raise InputError(f"holds {type(data).__name__}, not a list of boxes", location=str(path))
    frames = [frame for frame in data if frame] if any(isinstance(frame, list) for frame in data) else [data]
    if len(frames) > 1:
        raise InputError(f"holds boxes of {len(frames)} frames", location=str(path), hint="write one file an image")
    image = _beside(path, context)

    def boxes() -> Iterator[RawBox]:
        for index, entry in enumerate(frames[0] if frames else []):
            place = f"{path}[{index}]"
            xywh = [need(entry, key, place) for key in ("x", "y", "width", "height")]
            more = entry.get("metadata") if isinstance(entry.get("metadata"), Mapping) else {}
            phrase = entry.get("label") or more.get("desc") or more.get("name")
            yield RawBox(place, xywh, text(phrase, "the label", place))

    things = context.things(boxes(), "xywh", unit="pixel", size=size_of(image, str(path)))
    return Sample(image, str(path), things, _caption_beside(image, path))


def _beside(path: Path, context: Context) -> Path:
    """The image with the stem of `path`, beside it or in `--images`. Raises `MissingImageError` where there is none."""
    for folder in (path.parent, *([context.images] if context.images else [])):
        for suffix in SUFFIXES:
            candidate = folder / f"{path.stem}{suffix}"
            if candidate.is_file():
                return candidate
    raise MissingImageError(
        f"has no image {path.stem}.jpg or .png beside it",
        location=str(path),
        hint="give the images' folder with --images, or leave such records out with --skip-missing",
    )


def _caption_beside(image: Path, path: Path) -> str | None:
    """The text of the `.txt` beside the image or beside `path`; None where there is none."""
    files = [file for file in (image.with_suffix(".txt"), path.with_suffix(".txt")) if file.exists()]
    return (read_text(files[0]).strip() or None) if files else None
