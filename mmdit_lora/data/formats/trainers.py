"""What other trainers and interfaces keep beside an image: SimpleTuner's `.bbox` files, ComfyUI's bounding boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import (
    SUFFIXES,
    XYXY,
    Context,
    MissingImageError,
    Reads,
    Sample,
    need,
    put_image,
    read_text,
    require_folder,
    size_of,
    text,
    unique,
)
from mmdit_lora.data.formats.yolo import class_line, class_names
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError
from mmdit_lora.files import json_text
from mmdit_lora.json_files import numbered_lines, parse_json, read_json


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
        yield partial(_bbox_sample, path, context)


def write_simpletuner(folder: Path, items: Iterable[Item]) -> None:
    """Write each image, its `.bbox` (a JSON list) and its caption in a `.txt` side by side."""
    stems: set[Path] = set()
    for name, image, layout in unique(items, "SimpleTuner"):
        path = folder / name
        put_image(image, path)
        if path.with_suffix("") in stems:
            raise InputError(f"two images have the stem {path.stem!r}", hint="use --to jsonl")
        stems.add(path.with_suffix(""))
        entities = [{"label": box.phrase, "bbox": list(box.xyxy)} for box in layout.boxes]
        path.with_suffix(".bbox").write_text(json_text(entities, indent=2), encoding="utf-8")
        path.with_suffix(".txt").write_text(layout.caption, encoding="utf-8")


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
        yield partial(_comfyui_sample, path, context)


def _bbox_sample(path: Path, context: Context) -> Sample:
    image = beside(path, context)
    things = [thing for thing in _bbox_things(path, context, image) if thing is not None]
    return Sample(image, str(path), things, caption_beside(image, path))


def _bbox_things(path: Path, context: Context, image: Path) -> Iterator[tuple[str, XYXY] | None]:
    content = read_text(path)
    lines = numbered_lines(content)
    first = content.lstrip()[:1]
    if first == "[":
        data = parse_json(content, location=str(path))
        for index, entity in enumerate(data):
            yield _entity(entity, f"{path}[{index}]", context, image)
    elif first == "{":
        for line_number, line in lines:
            location = f"{path}:{line_number}"
            yield _entity(parse_json(line, location=location), location, context, image)
    elif lines:
        names = class_names(context.src)
        for line_number, line in lines:
            yield class_line(line, names, f"{path}:{line_number}", context, image)


def _entity(entity: Any, location: str, context: Context, image: Path) -> tuple[str, XYXY] | None:
    label = text(need(entity, "label", location), "label", location)
    box = context.box(need(entity, "bbox", location), "xyxy", location, image=image)
    return None if box is None else (label, box)


def _comfyui_sample(path: Path, context: Context) -> Sample:
    data = read_json(path)
    if not isinstance(data, list):
        raise InputError(f"holds {type(data).__name__}, not a list of boxes", location=str(path))
    frames = [frame for frame in data if frame] if any(isinstance(frame, list) for frame in data) else [data]
    if len(frames) > 1:
        raise InputError(f"holds boxes of {len(frames)} frames", location=str(path), hint="write one file an image")
    image = beside(path, context)
    size = size_of(image, str(path))
    things = []
    for index, entry in enumerate(frames[0] if frames else []):
        location = f"{path}[{index}]"
        box = context.box(
            [need(entry, key, location) for key in ("x", "y", "width", "height")],
            "xywh",
            location,
            unit="pixel",
            size=size,
        )
        more = entry.get("metadata") if isinstance(entry.get("metadata"), Mapping) else {}
        phrase = text(entry.get("label") or more.get("desc") or more.get("name"), "the label", location)
        if box is not None:
            things.append((phrase, box))
    return Sample(image, str(path), things, caption_beside(image, path))


def beside(path: Path, context: Context) -> Path:
    """The image with the stem of `path`, beside it or in `--images`. Raises `MissingPictureError` where there is none."""
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


def caption_beside(image: Path, path: Path) -> str | None:
    """The text of the `.txt` beside the image or beside `path`; None where there is none."""
    for file in (image.with_suffix(".txt"), path.with_suffix(".txt")):
        if file.exists():
            return read_text(file).strip() or None
    return None
