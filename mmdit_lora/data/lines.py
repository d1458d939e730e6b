"""The layout of one line of a data set, wherever the line lies: its keys, the conventions of its boxes, what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.layout import Box, Layout

BBOX_FORMATS = ("xyxy", "xywh", "cxcywh")
BBOX_UNITS = ("relative", "pixel")
COLUMNS = ("file_name", "caption", "objects", "bbox_format", "bbox_units")
_OBJECTS = ("bbox", "phrase")


class BoxFormatError(InputError):
    """Boxes that are wrong as xyxy, and would all be right as xywh."""


MISSING = {
    "file_name": "name the picture, relative to the folder",
    "caption": "give the text of the whole picture",
    "objects": 'give {"bbox": [...], "phrase": [...]}; both lists empty for a picture without boxes',
}


def parse_layout(data: Any, size: Callable[[], tuple[int, int]], *, bbox_format: str, bbox_units: str) -> Layout:
    """The layout of one line, or of what holds the same keys elsewhere.

    Args:
        data: `caption`, `objects`, perhaps `bbox_format` and `bbox_units`; other keys are not looked at.
        size: called for (width, height) in pixels where boxes are in pixels.

    Raises:
        InputError: the first thing that is wrong, with the key but without the file.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", cure=f"its keys are {', '.join(COLUMNS[1:3])}")
    for key in COLUMNS[1:3]:
        if key not in data:
            raise InputError(f"{key!r} is missing", cure=MISSING[key])
    return Layout(
        caption=text_of(data["caption"], "caption"),
        boxes=_boxes(
            data["objects"],
            size,
            _choice(data.get("bbox_format", bbox_format), BBOX_FORMATS, "bbox_format"),
            _choice(data.get("bbox_units", bbox_units), BBOX_UNITS, "bbox_units"),
        ),
    )


def text_of(value: Any, where: str) -> str:
    """`value`, if it is a text that can be written as UTF-8. Raises `InputError` at `where`."""
    if not isinstance(value, str):
        raise InputError(f"is {json.dumps(value)[:80]}, not a text", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"holds half a character ({value!r})", where=where, cure="write the text as UTF-8") from None
    return value


def _boxes(objects: Any, size: Callable[[], tuple[int, int]], bbox_format: str, bbox_units: str) -> tuple[Box, ...]:
    if not isinstance(objects, Mapping):
        raise InputError(f"objects is {type(objects).__name__}, not an object", cure=MISSING["objects"])
    for key in objects:
        if key not in _OBJECTS:
            raise unknown_key(key, _OBJECTS, where="objects")
    for key in _OBJECTS:
        if not isinstance(objects.get(key), list):
            what = f"is {type(objects[key]).__name__}, not a list" if key in objects else "is missing"
            raise InputError(what, where=f"objects.{key}", cure=MISSING["objects"])
    bbox, phrases = objects["bbox"], objects["phrase"]
    if len(bbox) != len(phrases):
        raise InputError(
            f"{len(bbox)} boxes and {len(phrases)} phrases", where="objects", cure="give each box its phrase"
        )
    numbers = [_four_numbers(value, index) for index, value in enumerate(bbox)]
    texts = [text_of(value, f"objects.phrase[{index}]") for index, value in enumerate(phrases)]
    width, height = size() if bbox_units == "pixel" and bbox else (1, 1)
    try:
        return _as_boxes(numbers, texts, bbox_format, width, height)
    except InputError as error:
        if bbox_format == "xyxy" and _readable(numbers, texts, "xywh", width, height):
            cure = 'check the order [left, top, right, bottom]; as xywh all boxes of this line would fit: if that is meant, set "bbox_format": "xywh" (here or in the config)'
            raise BoxFormatError(error.what, where=error.where, cure=cure) from None
        raise


def _as_boxes(
    numbers: list[tuple[float, ...]], phrases: list[str], bbox_format: str, width: int, height: int
) -> tuple[Box, ...]:
    boxes = []
    for index, (four, phrase) in enumerate(zip(numbers, phrases, strict=True)):
        a, b, c, d = four[0] / width, four[1] / height, four[2] / width, four[3] / height
        if bbox_format == "xywh":
            xyxy = (a, b, a + c, b + d)
        elif bbox_format == "cxcywh":
            xyxy = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        else:
            xyxy = (a, b, c, d)
        try:
            boxes.append(Box(xyxy=xyxy, phrase=phrase))
        except InputError as error:
            as_written = (bbox_format, width, height) == ("xyxy", 1, 1)
            what = error.what if as_written else f"{error.what} (written as {bbox_format} {list(four)})"
            pixels = (width, height) == (1, 1) and max(four) > 2
            cure = 'these look like pixels: set "bbox_units": "pixel" (here or in the config)' if pixels else error.cure
            raise InputError(what, where=f"objects.bbox[{index}]", cure=cure) from None
    return tuple(boxes)


def _readable(numbers: list[tuple[float, ...]], phrases: list[str], bbox_format: str, width: int, height: int) -> bool:
    try:
        _as_boxes(numbers, phrases, bbox_format, width, height)
    except InputError:
        return False
    return True


def _four_numbers(value: Any, index: int) -> tuple[float, ...]:
    where = f"objects.bbox[{index}]"
    if not isinstance(value, list) or len(value) != 4:
        raise InputError(f"is {json.dumps(value)[:80]}", where=where, cure="give four numbers")
    numbers = []
    for number in value:
        try:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InputError(f"holds {json.dumps(number)[:80]}", where=where, cure="give four finite numbers")
            numbers.append(float(number))
        except OverflowError:
            raise InputError("holds a number beyond all bounds", where=where) from None
    return tuple(numbers)


def _choice(value: Any, known: tuple[str, ...], key: str) -> str:
    if value not in known:
        raise InputError(f"{key} is {json.dumps(value)[:80]}", cure=f"give one of {', '.join(known)}")
    return str(value)
