"""Open Images: a csv of boxes in the order XMin, XMax, YMin, YMax, relative, and a csv of the classes' names.

Source of the format: the Open Images site, "Data formats". `IsGroupOf` boxes cover more than five objects and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import Context, Reads, Sample, need, read_text, text
from mmdit_lora.data.formats.tables import Row, rows
from mmdit_lora.errors import InputError, unknown_key

_SIDES = ("XMin", "XMax", "YMin", "YMax")


def read_open_images(context: Context) -> Reads:
    """Records of a folder with `*-annotations-bbox.csv`, or of one such file.

    The names of the classes are those of `*class-descriptions*.csv` beside it; a label that is no `/m/...` code is its own
    name. Images are `<ImageID>.jpg`.

    Raises:
        InputError: no such csv, or not its columns. A record: an image, a class's name, or a number is missing.
    """
    paths = _box_files(context)
    names = _class_names(paths[0].parent)
    seen: set[str] = set()
    # The csv has millions of lines; those of an image follow one another.
    for name, table in groupby(rows(paths), key=_image_id):
        again = name in seen
        seen.add(name)
        yield partial(_sample, name, list(table), names, context, again)


def _image_id(row: Row) -> str:
    location, content = row
    # A line that cannot be read belongs to no image: it is a record of its own.
    return str(content.get("ImageID")) if isinstance(content, Mapping) else location


def _box_files(context: Context) -> list[Path]:
    src, split = context.src, context.split
    if src.is_file():
        return [src]
    found = sorted(src.glob("*bbox*.csv")) if src.is_dir() else []
    if not found:
        raise InputError(
            "holds no *-annotations-bbox.csv", location=str(src), hint="give the csv file itself, and --images"
        )
    splits = {path.name.split("-")[0]: path for path in found}
    if split is None:
        return found
    if split not in splits:
        raise unknown_key(split, splits, location="--split")
    return [splits[split]]


def _class_names(folder: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*class-descriptions*.csv")):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            label, comma, name = line.partition(",")
            if not comma:
                raise InputError("has no comma", location=f"{path}:{number}", hint="write LabelName,DisplayName")
            names[label.strip()] = name.strip().strip('"')
    return names


def _sample(name: str, table: Iterable[Row], names: Mapping[str, str], context: Context, again: bool) -> Sample:
    things, first, image = [], "", None
    for location, row in table:
        if isinstance(row, InputError):
            raise row
        if image is None:
            first = location
            if again:
                raise InputError(
                    f"the lines of image {name!r} are apart", location=location, hint="sort the csv by ImageID"
                )
            image = context.image_finder.find(
                f"{text(need(row, 'ImageID', location), 'ImageID', location)}.jpg", location
            )
        label = _named(row, names, location)
        sides = [need(row, key, location) for key in _SIDES]
        if str(row.get("IsGroupOf", "0")).strip() == "1":
            context.leave_out("groups of objects")
            continue
        box = context.box(sides, "xxyy", location, image=image)
        if box is not None:
            things.append((label, box))
    if image is None:
        raise InputError(f"image {name!r} has no line")
    return Sample(image, first, things)


def _named(row: Mapping[str, Any], names: Mapping[str, str], location: str) -> str:
    label = text(need(row, "LabelName", location), "LabelName", location)
    if label in names:
        return names[label]
    if label.startswith("/"):
        raise InputError(
            f"the class {label!r} has no name",
            location=location,
            hint="put class-descriptions-boxable.csv beside the boxes",
        )
    return label
