"""Box and Layout: the one domain type.

A box is `xyxy` in [0, 1] of the image's width and height, x to the right, y down. Every other convention is converted
by the reader that meets it; nothing behind a reader ever sees another one.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit_lora.boxes import (
    BBOX_FORMATS,
    BBOX_UNITS,
    EDGE_RULE,
    ROUNDING,
    Boxed,
    EdgeCount,
    Four,
    Reading,
    clip,
    evidence,
    four_numbers,
    overshoot,
    relative,
    within_edge,
)
from mmdit_lora.errors import InputError, several, shown, unknown_key
from mmdit_lora.errors import clip as clip_text
from mmdit_lora.files import inside, read_lines, read_text
from mmdit_lora.json_files import UNIQUE, TwiceError, json_errors, parse_json

log = logging.getLogger(__name__)

MOST_BOXES = 10_000  # of a layout: every pair of them meets in attention
MOST_CAPTION, MOST_PHRASE = 100_000, 10_000  # characters; text encoders read a few hundred
EXAMPLE = '{"caption": "a red square", "boxes": [{"xyxy": [0.1, 0.1, 0.5, 0.5], "phrase": "a red square"}]}'
_LAYOUT_KEYS = ("caption", "boxes", "bbox_format", "bbox_units", "width", "height")
_LINE_KEYS = ("file_name", "caption", "objects", "bbox_format", "bbox_units", "width", "height")

_PLAIN = Reading("xyxy", "relative")
Size = tuple[int, int]
Clipped = list[tuple[float, str]]  # (share of the side that a box left its image by, its place in the layout)


class BoxError(InputError):
    """A box that leaves its image, is inverted or empty: perhaps all boxes of the set are read in the wrong way."""


@dataclass(frozen=True, slots=True)
class Box:
    """One box and its phrase.

    Args:
        xyxy: (left, top, right, bottom), each in [0, 1], left < right, top < bottom; clipped where it leaves the image by
            at most `EDGE_SHARE` of the side.
        phrase: the text of the box, e.g. "a red circle"; not empty, at most `MOST_PHRASE` characters.

    Raises:
        InputError: a coordinate is missing, not a finite number, outside the image, inverted; or the phrase is empty.
    """

    xyxy: Four
    phrase: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "xyxy", _validated_xyxy(self.xyxy))
        if not isinstance(self.phrase, str) or not self.phrase.strip():
            raise InputError(f"the phrase is {shown(self.phrase)}", hint="give each box a phrase, e.g. 'a red circle'")
        _check_text(self.phrase, "the phrase", MOST_PHRASE)

    @property
    def width(self) -> float:
        return self.xyxy[2] - self.xyxy[0]

    @property
    def height(self) -> float:
        return self.xyxy[3] - self.xyxy[1]

    @property
    def area(self) -> float:
        """Share of the image that the box covers, in (0, 1]."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Layout:
    """A caption and boxes with phrases. `boxes` may be empty: that is text-to-image, and the layout stream is silent.

    Raises:
        InputError: the caption is not a string, or has more than `MOST_CAPTION` characters; a box is not a `Box`; there are
            more than `MOST_BOXES`.
    """

    caption: str
    boxes: tuple[Box, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str):
            raise InputError(
                f"the caption is {shown(self.caption)}", hint="give the layout a caption: the text of the whole image"
            )
        _check_text(self.caption, "the caption", MOST_CAPTION)
        if isinstance(self.boxes, str) or not isinstance(self.boxes, Sequence):
            raise InputError(f"boxes is {type(self.boxes).__name__}", hint="give a list of boxes")
        check_count(len(self.boxes))
        object.__setattr__(self, "boxes", tuple(self.boxes))
        for index, box in enumerate(self.boxes):
            if not isinstance(box, Box):
                raise InputError(f"is {type(box).__name__}, not a Box", location=f"boxes[{index}]")

    @classmethod
    def from_dict(cls, data: Any, *, size: Callable[[], Size] | None = None, clipped: Clipped | None = None) -> Layout:
        """From the layout-file form `{"caption": ..., "boxes": [{"xyxy": [...], "phrase": ...}, ...]}`, or a data set's line.

        Both may hold `bbox_format` ("xyxy" | "xywh" | "cxcywh", then `xyxy` or `bbox` of a box are four such numbers) and
        `bbox_units` ("relative" | "pixel", of `width` and `height` | "permille"). `boxes` may be left out. A line is what
        has `objects`: `{"file_name": ..., "caption": ..., "objects": {"bbox": [...], "phrase": [...]}}`; its other columns
        are ignored, as in a data set.

        Args:
            size: called for (width, height) in pixels where boxes are in pixels and `width` and `height` are not there.
            clipped: is filled with the boxes that left their image by little and were clipped.

        Raises:
            InputError: with the place of the first thing that is wrong (`boxes[2]: ...`). Unknown keys are errors.
        """
        line = isinstance(data, Mapping) and "objects" in data
        _check_keys(data, _LINE_KEYS if line else _LAYOUT_KEYS, required=("caption",), near_only=line)
        reading = reading_of(data)
        size = size if line and size is not None else _stated_size(data)
        if line:
            boxes = boxes_of_line(data["objects"], reading, size, clipped)
        else:
            boxes = boxes_of_layout(data.get("boxes", []), reading, size, clipped)
        return cls(caption=data["caption"], boxes=boxes)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return {"caption": self.caption, "boxes": [{"xyxy": list(b.xyxy), "phrase": b.phrase} for b in self.boxes]}


def read_layouts(path: str | Path, *, image_size: Callable[[Path], Size] | None = None) -> list[Layout]:
    """Layouts of a `.json` file (one layout, or a list of them) or a `.jsonl` file (one a line), see `Layout.from_dict`.

    Boxes that were clipped are counted in one warning of the log.

    Args:
        image_size: (width, height) in pixels of an image beside the file, for lines of data sets in pixels.

    Raises:
        InputError: the file is missing, is no JSON, holds no layout, or layouts are wrong; with file and line.
    """
    path = Path(path)
    hint = f"give a .json file of one layout or a .jsonl of many, e.g. {EXAMPLE}"
    layouts, errors, seen, edges = [], [], [], EdgeCount()
    for location, item in read_json_records(path, what="layout file", hint=hint):
        clipped: Clipped = []
        try:
            if isinstance(item, InputError):
                raise item
            layouts.append(Layout.from_dict(item, size=_beside(item, path, location, image_size), clipped=clipped))
        except InputError as error:
            errors.append(error.at(location) if error.location != location else error)
        for by, place in clipped:
            edges.add(by, f"{location}: {place}")
        if isinstance(item, Mapping):
            seen.append(item)
    if errors:
        raise several(errors, location=str(path), hint=_hint(errors, seen))
    if not layouts:
        raise InputError("holds no layout", location=str(path), hint=hint)
    if edges.message:
        log.warning("warning: %s: %s", path, edges.message)
    return layouts


def read_json_records(
    path: Path, *, what: str, limit: int = 2**28, hint: str | None = None
) -> Iterator[tuple[str, Any]]:
    """(place, value or the `InputError` of that line) of a file of JSON lines, one at a time; or of what else stands there
    in their place: a JSON array, or objects over several lines each, which are read whole.

    The place is `FILE:LINE`; of a `.json` file with one object the file, of one with a list `FILE[INDEX]`.

    Args:
        limit: the most bytes that are read whole.

    Raises:
        InputError: no regular file, not a text, no JSON where it is read whole.
    """
    lines = read_lines(path, what=what, hint=hint)
    number, first = next(lines, (0, ""))
    if not number:
        if path.suffix == ".json":
            raise InputError("is empty", location=str(path), hint=hint)
        return
    if path.suffix == ".json" or first[0] == "[":
        yield from _whole_json(read_text(path, what=what, limit=limit, hint=hint), path)
        return
    if first == "{":  # objects over several lines, or a broken first line
        try:
            whole = list(_whole_json(read_text(path, what=what, limit=limit, hint=hint), path))
        except TwiceError:
            raise
        except InputError:
            whole = []
        if whole:
            yield from whole
            return
    while number:
        location = f"{path}:{number}"
        try:
            yield location, parse_json(first, location=location)
        except InputError as error:
            yield location, error
        number, first = next(lines, (0, ""))


def _whole_json(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    at = _skip(text, 0)
    if path.suffix == ".json":
        data = parse_json(text, location=str(path)) if not _holds_lines(text, at) else None
        if isinstance(data, list):
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(data))
            return
        if data is not None:
            yield str(path), data
            return
    array = text[at] == "["
    at, line, counted = at + array, 1, 0
    while (at := _skip(text, at)) < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        location = f"{path}:{line}"
        with json_errors(location):
            value, at = UNIQUE.raw_decode(text, at)
            at = _skip(text, at)
            if array and text[at : at + 1] == ",":
                at += 1
            elif array and text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        yield location, value
    if array and _skip(text, at + 1) < len(text):
        raise InputError(
            "begins with a JSON array, and more stands behind it",
            location=f"{path}:{line}",
            hint="write one JSON object a line",
        )


def _holds_lines(text: str, at: int) -> bool:
    """Whether the text is several JSON values one after the other."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return False
    return text[at] == "{" and text[_skip(text, end) : _skip(text, end) + 1] == "{"


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def reading_of(data: Mapping[str, Any], default: Reading = _PLAIN) -> Reading:
    """How `data` says that its boxes are to be read. Raises `InputError` for another word."""
    if "bbox_format" not in data and "bbox_units" not in data:
        return default
    return Reading(
        _choice(data.get("bbox_format", default.order), BBOX_FORMATS, "bbox_format"),
        _choice(data.get("bbox_units", default.unit), BBOX_UNITS, "bbox_units"),
    )


def boxes_of_layout(
    items: Any, reading: Reading, size: Callable[[], Size] | None, clipped: Clipped | None = None
) -> tuple[Box, ...]:
    """Boxes of `[{"xyxy": [...], "phrase": ...}, ...]`. Raises `InputError` with `boxes[N]`."""
    if not isinstance(items, list):
        raise InputError(f"is {type(items).__name__}, not a list", location="boxes", hint=f"write {EXAMPLE}")
    check_count(len(items))
    boxes = []
    for index, item in enumerate(items):
        place = f"boxes[{index}]"
        try:
            key = "bbox" if isinstance(item, Mapping) and "bbox" in item else "xyxy"
            if key == "bbox" and "xyxy" in item:
                raise InputError("holds both xyxy and bbox", hint="give one of the two")
            _check_keys(item, ("xyxy", "bbox", "phrase"), required=(key, "phrase"), numbers="xyxy")
        except InputError as error:
            raise error.at(place) from None
        boxes.append(as_box(item[key], item["phrase"], reading, size, place, clipped))
    return tuple(boxes)


def boxes_of_line(
    objects: Any, reading: Reading, size: Callable[[], Size] | None, clipped: Clipped | None = None
) -> tuple[Box, ...]:
    """Boxes of a data set's `{"bbox": [...], "phrase": [...]}`. Raises `InputError` with `objects.bbox[N]`."""
    hint = 'give {"bbox": [...], "phrase": [...]}; both lists empty for an image without boxes'
    if not isinstance(objects, Mapping):
        raise InputError(f"objects is {type(objects).__name__}, not an object", hint=hint)
    for key in objects:
        if key not in ("bbox", "phrase"):
            raise _unknown_box_key(key, ("bbox", "phrase"), "bbox").at("objects")
    for key in ("bbox", "phrase"):
        if not isinstance(objects.get(key), list):
            what = f"is {type(objects[key]).__name__}, not a list" if key in objects else "is missing"
            raise InputError(what, location=f"objects.{key}", hint=hint)
    bbox, phrases = objects["bbox"], objects["phrase"]
    if len(bbox) != len(phrases):
        what = f"{len(bbox)} boxes and {len(phrases)} phrases"
        raise InputError(what, location="objects", hint="give each box its phrase")
    check_count(len(bbox))
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, str):
            raise InputError(f"is {_json(phrase)}, not a text", location=f"objects.phrase[{index}]")
    return tuple(
        as_box(four, phrase, reading, size, f"objects.bbox[{index}]", clipped)
        for index, (four, phrase) in enumerate(zip(bbox, phrases, strict=True))
    )


def as_box(
    value: Any,
    phrase: Any,
    reading: Reading,
    size: Callable[[], Size] | None,
    location: str,
    clipped: Clipped | None = None,
) -> Box:
    """A box of four numbers as they stand, clipped where it leaves the image by no more than `EDGE_RULE` says.

    Args:
        size: called for (width, height) in pixels, for boxes in pixels and for those that leave the image.

    Raises:
        InputError: no four finite numbers, the size of pixels is not known, or the phrase is empty.
        BoxError: the box is inverted, empty, or leaves the image by more.
    """
    numbers = four_numbers(value)
    if numbers is None:
        what = f"is {_json(value)}: not four finite numbers"
        raise InputError(what, location=location, hint="give [left, top, right, bottom]")
    if reading.unit == "pixel" and size is None:
        hint = 'add "width" and "height" in pixels to the layout, or write relative boxes'
        raise InputError("boxes in pixels need the size of the image", location=location, hint=hint)
    pixels = size() if reading.unit == "pixel" and size else None
    xyxy = numbers if reading == _PLAIN else relative(numbers, reading, pixels)
    if min(xyxy) < -ROUNDING or max(xyxy) > 1 + ROUNDING:
        by = max(overshoot(xyxy))
        # Of a small image two pixels may be more than the share: the size is read where that could matter.
        if not within_edge(xyxy, pixels) and pixels is None and size is not None and by < 0.25:
            pixels = size()
        left, top, right, bottom = inner = clip(xyxy)
        if within_edge(xyxy, pixels) and left < right and top < bottom:
            if clipped is not None:
                clipped.append((by, location))
            xyxy = inner
    try:
        return Box(xyxy, phrase)
    except BoxError as error:
        if reading == _PLAIN:
            raise BoxError(error.what, location=location, hint=error.hint) from None
        what = f"{error.what} (written as {reading.order} {_few(numbers)})"
        hint = f"correct or remove the box; declared are {reading.allows} ({EDGE_RULE})"
        raise BoxError(what, location=location, hint=hint) from None
    except InputError as error:
        raise error.at(location) from None


def check_count(boxes: int) -> None:
    """Raises `InputError`: more boxes than a layout may have."""
    if boxes > MOST_BOXES:
        what = f"holds {boxes:,} boxes, and a layout has at most {MOST_BOXES:,}"
        raise InputError(what, hint="leave the smallest ones out")


def _beside(
    item: Any, path: Path, location: str, image_size: Callable[[Path], Size] | None
) -> Callable[[], Size] | None:
    """For the size of the image that a line of a data set names."""
    if image_size is None or not isinstance(item, Mapping) or "file_name" not in item:
        return None
    return lambda: image_size(inside(path.parent, item["file_name"], location=location, what="image"))


def _stated_size(data: Mapping[str, Any]) -> Callable[[], Size] | None:
    """For the size that `width` and `height` state. Raises `InputError` where they are no numbers of pixels."""
    if "width" not in data and "height" not in data:
        return None
    stated = data.get("width"), data.get("height")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not 0 < v < 2**31 for v in stated):
        what = f"width and height are {_json(stated[0])} and {_json(stated[1])}"
        raise InputError(what, hint="give both as numbers of pixels")
    return lambda: stated  # type: ignore[return-value]


def _hint(errors: Sequence[InputError], seen: Sequence[Mapping[str, Any]]) -> str | None:
    """The shares under each reading, and what to declare, where boxes of layouts are wrong."""
    if not any(isinstance(error, BoxError) for error in errors):
        return None
    sets, declared = [], set()
    for data in seen:
        try:
            declared.add(reading_of(data))
            size = _stated_size(data)
            objects, boxes = data.get("objects"), data.get("boxes")
            values = objects.get("bbox") if isinstance(objects, Mapping) else boxes
            four = (v.get("xyxy", v.get("bbox")) if isinstance(v, Mapping) else v for v in values or ())
            sets.append(Boxed([f for v in four if (f := four_numbers(v))], size() if size else None))
        except (InputError, TypeError):
            continue
    found = evidence(sets, declared.pop()) if len(declared) == 1 else None
    return found.beside_error if found else None


def _check_keys(
    data: Any, known: Sequence[str], *, required: Sequence[str], near_only: bool = False, numbers: str | None = None
) -> None:
    """Refuse keys that are not known; with `near_only` those alone that look like a known one misspelt.

    Args:
        numbers: of a box, the key of its numbers.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object with {', '.join(required)}", hint=f"write {EXAMPLE}")
    for key in data:
        if key not in known and not (near_only and not difflib.get_close_matches(str(key)[:100], known, 1, 0.8)):
            raise _unknown_box_key(key, known, numbers) if numbers else unknown_key(key, known)
    for key in required:
        if key not in data:
            raise InputError(f"{key!r} is missing", hint=f"write {EXAMPLE}")


def _unknown_box_key(key: Any, known: Sequence[str], numbers: str) -> InputError:
    """The nearest key of a box is never advised where that would read its numbers in another order."""
    error = unknown_key(key, known)
    if key in BBOX_FORMATS:
        error.hint = f'write the numbers under "{numbers}" and declare "bbox_format": "{key}" beside the caption'
    elif key in ("box", "boxes", "bboxes", "bbox"):
        error.hint = (
            f'write the numbers under "{numbers}"; where they are not [left, top, right, bottom], '
            'declare "bbox_format": "xywh" or "cxcywh" beside the caption'
        )
    return error


def _choice(value: Any, known: tuple[str, ...], key: str) -> str:
    if value not in known:
        raise InputError(f"{key} is {_json(value)}", hint=f"give one of {', '.join(known)}")
    return str(value)


def _json(value: Any) -> str:
    return clip_text(json.dumps(value, default=repr), 80)


def _few(numbers: Four) -> str:
    return f"[{', '.join(f'{v:.6g}' for v in numbers)}]"


def _check_text(text: str, what: str, most: int) -> None:
    """JSON may spell half a character (a lone surrogate), which no file or tokenizer takes."""
    if len(text) > most:
        what = f"{what} has {len(text):,} characters, and at most {most:,} are read"
        raise InputError(what, hint="shorten it to what is shown")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{what} {text!r} holds half a character", hint="write it as UTF-8 text") from None


def _validated_xyxy(value: Any) -> Four:
    if type(value) is tuple and len(value) == 4:  # most are right, and a set has millions
        left, top, right, bottom = value
        floats = type(left) is type(top) is type(right) is type(bottom) is float
        if floats and 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return value
    hint = "give four numbers: [left, top, right, bottom], each in [0, 1]"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 4:
        raise InputError(f"xyxy is {shown(value)}", hint=hint)
    four = four_numbers(list(value))
    if four is None:
        raise InputError(f"xyxy is {shown(list(value))}: not four finite numbers", hint=hint)
    left, top, right, bottom = four
    if right < left or bottom < top:
        hint = "left must be < right, top < bottom: check the order [left, top, right, bottom], or declare another one "
        raise BoxError(f"the box {_few(four)} is inverted", hint=f"{hint}(bbox_format)")
    if right == left or bottom == top:
        side = "width" if right == left else "height"
        raise BoxError(f"the box {_few(four)} is empty: its {side} is 0", hint="give it one, or remove it")
    if not within_edge(four, None):
        hint = f"correct the box, whose sides run from 0 to 1 ({EDGE_RULE})"
        if max(four) > 2:
            hint = 'sides run from 0 to 1, and these look like pixels or thousandths: declare "bbox_units": '
            hint += '"pixel" or "permille"'
        raise BoxError(f"the box {_few(four)} leaves the image", hint=hint)
    left, top, right, bottom = inner = clip(four)
    if right <= left or bottom <= top:
        raise BoxError(f"the box {_few(four)} lies outside the image", hint="correct the box, or remove it")
    return inner
