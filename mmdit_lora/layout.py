"""Box and Layout: the one domain type.

A box is `xyxy` in [0, 1] of the picture's width and height, x to the right, y down. Every other convention is converted
by the reader that meets it; nothing behind a reader ever sees another one.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit_lora.errors import InputError, unknown_key

# Annotation tools round: a coordinate may leave the picture by less than this and is clipped, not refused.
EDGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Box:
    """One box and its phrase.

    Args:
        xyxy: (left, top, right, bottom), each in [0, 1], left < right, top < bottom.
        phrase: the text of the box, e.g. "a red circle"; not empty.

    Raises:
        InputError: a coordinate is missing, not a finite number, outside the picture, inverted; or the phrase is empty.
    """

    xyxy: tuple[float, float, float, float]
    phrase: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "xyxy", _validated_xyxy(self.xyxy))
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise InputError(f"the phrase is {self.phrase!r}", cure="give each box a phrase, e.g. 'a red circle'")
        _check_text(self.phrase, "the phrase")

    @property
    def width(self) -> float:
        return self.xyxy[2] - self.xyxy[0]

    @property
    def height(self) -> float:
        return self.xyxy[3] - self.xyxy[1]

    @property
    def area(self) -> float:
        """Share of the picture that the box covers, in (0, 1]."""
        return self.width * self.height


@dataclass(frozen=True)
class Layout:
    """A caption and boxes with phrases. `boxes` may be empty: that is text-to-image, and the layout stream is silent.

    Raises:
        InputError: the caption is not a string, or a box is not a `Box`.
    """

    caption: str
    boxes: tuple[Box, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str):
            raise InputError(
                f"the caption is {self.caption!r}", cure="give the layout a caption: the text of the whole picture"
            )
        _check_text(self.caption, "the caption")
        if isinstance(self.boxes, str) or not isinstance(self.boxes, Sequence):
            raise InputError(f"boxes is {type(self.boxes).__name__}", cure="give a list of boxes")
        object.__setattr__(self, "boxes", tuple(self.boxes))
        for index, box in enumerate(self.boxes):
            if not isinstance(box, Box):
                raise InputError(f"is {type(box).__name__}, not a Box", where=f"boxes[{index}]")

    @classmethod
    def from_dict(cls, data: Any) -> Layout:
        """From the layout-file form `{"caption": ..., "boxes": [{"xyxy": [...], "phrase": ...}, ...]}`.

        Raises:
            InputError: with the place of the first thing that is wrong (`boxes[2]: ...`). Unknown keys are errors.
        """
        _check_keys(data, required=("caption", "boxes"))
        if not isinstance(data["boxes"], list):
            raise InputError(f"is {type(data['boxes']).__name__}, not a list", where="boxes")
        boxes = []
        for index, item in enumerate(data["boxes"]):
            try:
                _check_keys(item, required=("xyxy", "phrase"))
                boxes.append(Box(xyxy=item["xyxy"], phrase=item["phrase"]))
            except InputError as error:
                raise error.at(f"boxes[{index}]") from None
        return cls(caption=data["caption"], boxes=tuple(boxes))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {"caption": self.caption, "boxes": [{"xyxy": list(b.xyxy), "phrase": b.phrase} for b in self.boxes]}


def read_layouts(path: str | Path) -> list[Layout]:
    """Layouts of a `.json` file (one layout, or a list of them) or a `.jsonl` file (one a line).

    Raises:
        InputError: the file is missing, is no JSON, holds no layout, or a layout is wrong; with file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            "no such layout file", where=str(path), cure="give a .json file of one layout or a .jsonl of many"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text ({error})", where=str(path)) from None
    if path.suffix == ".jsonl":
        items = [(f"{path}:{n}", parse_json(line, where=f"{path}:{n}")) for n, line in numbered_lines(text)]
    else:
        data = parse_json(text, where=str(path))
        many = data if isinstance(data, list) else [data]
        items = [(f"{path}[{n}]" if isinstance(data, list) else str(path), item) for n, item in enumerate(many)]
    if not items:
        raise InputError("holds no layout", where=str(path))
    layouts = []
    for where, item in items:
        try:
            layouts.append(Layout.from_dict(item))
        except InputError as error:
            raise error.at(where) from None
    return layouts


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines of `text` that are not blank, with their numbers from 1.

    Split at newlines only: `str.splitlines` would also split at U+2028 and its kin, which JSON strings may hold.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def parse_json(text: str, *, where: str) -> Any:
    """`json.loads` that refuses NaN and Infinity and reports the place.

    Raises:
        InputError: with the line and column inside `text`.
    """

    def refuse(name: str) -> float:
        raise InputError(f"holds {name}", where=where, cure="write a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise InputError(f"is not JSON: {error.msg} (column {error.colno})", where=place) from None
    except InputError:
        raise
    except ValueError as error:  # an int of thousands of digits
        raise InputError(f"is not JSON that can be read: {str(error).split(';')[0]}", where=where) from None
    except RecursionError:
        raise InputError("is nested too deeply to be a layout", where=where) from None


def _check_keys(data: Any, *, required: tuple[str, ...]) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object with {', '.join(required)}")
    for key in data:
        if key not in required:
            raise unknown_key(key, required)
    for key in required:
        if key not in data:
            raise InputError(f"{key!r} is missing", cure=f"an object here has the keys {', '.join(required)}")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _check_text(text: str, what: str) -> None:
    """JSON may spell half a character (a lone surrogate), which no file or tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {text!r} holds half a character", cure="write it as UTF-8 text") from None


def _validated_xyxy(value: Any) -> tuple[float, float, float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 4:
        raise InputError(f"xyxy is {value!r}", cure="give four numbers: [left, top, right, bottom], each in [0, 1]")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not _is_finite(v) for v in value):
        raise InputError(
            f"xyxy is {reprlib.repr(list(value))}: not four finite numbers",
            cure="give [left, top, right, bottom] in [0, 1]",
        )
    left, top, right, bottom = (float(v) for v in value)
    if max(left, top, right, bottom) > 1 + EDGE_TOLERANCE or min(left, top, right, bottom) < -EDGE_TOLERANCE:
        pixels = max(left, top, right, bottom) > 2
        cure = (
            "these look like pixels: divide x by the width and y by the height"
            if pixels
            else "clip the box to the picture"
        )
        raise InputError(f"the box {list(value)} leaves the picture, whose sides run from 0 to 1", cure=cure)
    left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in (left, top, right, bottom))
    if right <= left or bottom <= top:
        raise InputError(
            f"the box {list(value)} is inverted or empty (left must be < right, top < bottom)",
            cure="check the order [left, top, right, bottom]; xywh must be declared as such",
        )
    return (left, top, right, bottom)
