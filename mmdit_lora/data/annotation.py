"""The layout of one line of a data set, wherever the line lies: its keys, the conventions of its boxes, what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mmdit_lora.boxes import BBOX_FORMATS, BBOX_UNITS, Reading
from mmdit_lora.errors import InputError, clip
from mmdit_lora.layout import Clipped, Layout, boxes_of_line, reading_of

__all__ = ["BBOX_FORMATS", "BBOX_UNITS", "COLUMNS", "MISSING", "parse_layout", "text_of"]

COLUMNS = ("file_name", "caption", "objects", "bbox_format", "bbox_units")

MISSING = {
    "file_name": "name the image, relative to the folder",
    "caption": "give the text of the whole image",
    "objects": 'give {"bbox": [...], "phrase": [...]}; both lists empty for an image without boxes',
}


def parse_layout(
    data: Any,
    size: Callable[[], tuple[int, int]],
    *,
    bbox_format: str,
    bbox_units: str,
    clipped: Clipped | None = None,
) -> Layout:
    """The layout of one line, or of what holds the same keys elsewhere.

    Args:
        data: `caption`, `objects`, perhaps `bbox_format` and `bbox_units`; other keys are not looked at.
        size: called for (width, height) in pixels where boxes are in pixels, or leave their image.
        clipped: is filled with the boxes that left their image by little and were clipped.

    Raises:
        InputError: the first thing that is wrong, with the key but without the file.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", hint=f"its keys are {', '.join(COLUMNS[1:3])}")
    for key in COLUMNS[1:3]:
        if key not in data:
            raise InputError(f"{key!r} is missing", hint=MISSING[key])
    reading = reading_of(data, Reading(bbox_format, bbox_units))
    boxes = boxes_of_line(data["objects"], reading, size, clipped)
    return Layout(caption=text_of(data["caption"], "caption"), boxes=boxes)


def text_of(value: Any, location: str) -> str:
    """`value`, if it is a text that can be written as UTF-8. Raises `InputError` at `where`."""
    if not isinstance(value, str):
        raise InputError(f"is {clip(json.dumps(value), 80)}, not a text", location=location)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"holds half a character ({value!r})", location=location, hint="write the text as UTF-8"
        ) from None
    return value
