"""YOLO (Ultralytics): images/**/x.jpg with labels/**/x.txt, names in data.yaml or classes.txt.

A line of a label file is `class cx cy w h`, relative to the image, perhaps with a confidence, or
`class x y x y x y ...`, a polygon. Source of the format: Ultralytics' pages on detection and segmentation data sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import yaml

from mmdit_lora.boxes import Four
from mmdit_lora.data.formats.captions import write_sidecar
from mmdit_lora.data.formats.common import (
    SUFFIXES,
    Context,
    Reads,
    Sample,
    number,
    points_box,
    put_image,
    read_text,
    read_yaml,
    require_folder,
    unique,
)
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import read_lines

_MOST_DIGITS = 18  # of a class: Python refuses to read a number of thousands
_NAME_FILES = ("classes.txt", "obj.names", "names.txt")


def read_yolo(context: Context) -> Reads:
    """Records of a YOLO folder: every image below a folder `images` (or any image, where there is no such folder).

    Raises:
        InputError: no images, no names of the classes. A record: a line of its label file is wrong.
    """
    src, split = context.src, context.split
    require_folder(src, "give the folder that holds data.yaml, images and labels")
    names = class_names(src)
    root = context.images or src
    found = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    folders = {path: set(path.relative_to(root).parts[:-1]) for path in found}
    images = [path for path in found if "images" in folders[path]] or found
    if not images:
        raise InputError("holds no image", location=str(root))
    if split is not None:
        splits = sorted(set().union(*(folders[path] for path in images)) - {"images"})
        if split not in splits:
            hint = f"--split takes {', '.join(splits)}" if splits else "leave --split away"
            raise InputError(f"has no folder of images {split!r}", location=str(root), hint=hint)
        images = [path for path in images if split in folders[path]]
    for path in images:
        yield partial(_sample, path, _label_file(path, root, src), names, context)


def write_yolo(folder: Path, items: Iterable[Item]) -> None:
    """Write images/, labels/, data.yaml and `captions.jsonl`. The classes are the phrases; coordinates keep all digits.

    Raises:
        InputError: an image has several layouts, or two images differ in the suffix alone.
    """
    classes: dict[str, int] = {}
    items = unique(items, "YOLO")
    for name, image, layout in items:
        put_image(image, folder / "images" / name)
        lines = []
        for box in layout.boxes:
            left, top, right, bottom = box.xyxy
            index = classes.setdefault(box.phrase, len(classes))
            lines.append(f"{index} {(left + right) / 2!r} {(top + bottom) / 2!r} {box.width!r} {box.height!r}\n")
        label = (folder / "labels" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(lines), encoding="utf-8")
    data = {"path": ".", "train": "images", "val": "images", "names": {index: name for name, index in classes.items()}}
    (folder / "data.yaml").write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), encoding="utf-8")
    write_sidecar(folder, items)


def class_names(src: Path) -> dict[int, str]:
    """Index -> name of the class, from the `names` of data.yaml, or the lines of classes.txt.

    Raises:
        InputError: there is no such file, or it is wrong.
    """
    for path in [src / "data.yaml", src / "dataset.yaml", *sorted(src.glob("*.yaml")), *sorted(src.glob("*.yml"))]:
        if path.is_file():
            return _yaml_names(path)
    for path in (src / name for name in _NAME_FILES):
        if path.is_file():
            return dict(enumerate(line.strip() for line in read_text(path).splitlines() if line.strip()))
    hint = f"add data.yaml with `names`, or {_NAME_FILES[0]} with a name a line"
    raise InputError("names no classes", location=str(src), hint=hint)


def class_line(
    line: str, names: Mapping[int, str], location: str, context: Context, image: Path
) -> tuple[str, Four] | None:
    """(class name, relative xyxy) of a line of a label file; None, and counted, where the box is empty.

    Raises:
        InputError: the line is wrong, or its class has no name.
    """
    first, *rest = line.split()
    index = int(first) if first.isdecimal() and len(first) <= _MOST_DIGITS else None
    if index is None or index not in names:
        hint = f"the {len(names)} names count from 0"
        raise InputError(f"class {shown(first)} has no name", location=location, hint=hint)
    values = [number(value, location) for value in rest]
    if len(values) in (4, 5):
        box = context.box(values[:4], "cxcywh", location, image=image)
    elif len(values) >= 6 and len(values) % 2 == 0:
        points = list(zip(values[::2], values[1::2], strict=True))
        box = context.box(points_box(points), "xyxy", location, image=image)
    else:
        what = f"has {len(values)} numbers after the class"
        raise InputError(what, location=location, hint="write `class cx cy w h`")
    return None if box is None else (names[index], box)


def _yaml_names(path: Path) -> dict[int, str]:
    data = read_yaml(path)
    names = data.get("names") if isinstance(data, Mapping) else None
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(pairs, Mapping) or not pairs:
        raise InputError("has no `names`", location=str(path), hint="list the classes: `names: [cat, dog]`")
    for index, name in pairs.items():
        if not isinstance(index, int) or not isinstance(name, str | int) or not str(name).strip():
            what = f"names holds {shown(index)}: {shown(name)}"
            raise InputError(what, location=str(path), hint="give a number and a name each")
    return {index: str(name).strip() for index, name in pairs.items()}


def _label_file(image: Path, root: Path, src: Path) -> Path:
    """Where the last folder `images` of an image's path is `labels`; else beside the image."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        return src.joinpath(*parts)
    below = src.joinpath("labels", *parts)
    return below if below.is_file() else image.with_suffix(".txt")


def _sample(image: Path, label: Path, names: Mapping[int, str], context: Context) -> Sample:
    # An image without a label file is an image without objects.
    lines = read_lines(label, what="label file") if label.exists() else ()
    found = (class_line(line, names, f"{label}:{number}", context, image) for number, line in lines)
    return Sample(image, str(label), [thing for thing in found if thing is not None])
