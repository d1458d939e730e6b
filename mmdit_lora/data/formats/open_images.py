"""Open Images: a csv of boxes in the order XMin, XMax, YMin, YMax, relative, and a csv of the classes' names.

Source of the format: the Open Images site, "Data formats". `IsGroupOf` boxes cover more than five objects and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import Context, RawBox, Reads, Sample, need, need_text, read_text
from mmdit_lora.data.formats.tables import Row, rows
from mmdit_lora.errors import InputError, unknown_key


def read_open_images(context: Context) -> Reads:
    """Records of a folder with `*-annotations-bbox.csv`, or of one such file.

    The names of the classes are those of `*class-descriptions*.csv` beside it; a label that is no `/m/...` code is its own
    name. Images are `<ImageID>.jpg`.

    Raises:
        InputError: no such csv, or not its columns. A record: an image, a class's name, or a number is missing.
    """
    paths = _box_files(context)
    names: dict[str, str] = {}
    for path in sorted(paths[0].parent.glob("*class-descriptions*.csv")):
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            label, comma, name = line.partition(",")
            if not comma:
                raise InputError("has no comma", location=f"{path}:{number}", hint="write LabelName,DisplayName")
            names[label.strip()] = name.strip().strip('"')
    seen: set[str] = set()
    # The csv has millions of lines; those of an image follow one another.
    for name, table in groupby(rows(paths), key=_image_id):
        yield partial(_sample, list(table), names, context, name in seen)
        seen.add(name)


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
        hint = "give the csv file itself, and --images"
        raise InputError("holds no *-annotations-bbox.csv", location=str(src), hint=hint)
    splits = {path.name.split("-")[0]: path for path in found}
    if split is not None and split not in splits:
        raise unknown_key(split, splits, location="--split")
    return found if split is None else [splits[split]]


def _sample(table: Sequence[Row], names: Mapping[str, str], context: Context, again: bool) -> Sample:
    location, row = table[0]
    if isinstance(row, InputError):
        raise row
    name = need_text(row, "ImageID", location)
    if again:
        raise InputError(f"the lines of image {name!r} are apart", location=location, hint="sort the csv by ImageID")
    image = context.image_finder.find(f"{name}.jpg", location)

    def boxes() -> Iterator[RawBox]:
        for place, row in table:
            label = _named(row, names, place)
            sides = [need(row, key, place) for key in ("XMin", "XMax", "YMin", "YMax")]
            if str(row.get("IsGroupOf", "0")).strip() == "1":
                context.leave_out("groups of objects")
            else:
                yield RawBox(place, sides, label)

    return Sample(image, location, context.things(boxes(), "xxyy", image=image))


def _named(row: Mapping[str, Any], names: Mapping[str, str], location: str) -> str:
    label = need_text(row, "LabelName", location)
    if label.startswith("/") and label not in names:
        hint = "put class-descriptions-boxable.csv beside the boxes"
        raise InputError(f"the class {label!r} has no name", location=location, hint=hint)
    return names.get(label, label)
