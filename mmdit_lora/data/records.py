"""The data set format: a folder with `metadata.jsonl`, one image with its layout a line (Hugging Face's imagefolder).

    {"file_name": "1.png", "caption": "...", "objects": {"bbox": [[x0, y0, x1, y1], ...], "phrase": ["...", ...]}}

A line may hold `bbox_format` and `bbox_units`; whatever they are, a `Record` has boxes as the rest of the package knows
them. `write_dataset` is the inverse. `read_written` gives the boxes as they stand in the file, right or wrong: the evidence
whether they are read as they are meant.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmdit_lora.boxes import Boxed, EdgeCount, Evidence, Four, Reading, evidence, four_numbers
from mmdit_lora.data.images import image_bytes, image_size, load_image
from mmdit_lora.errors import InputError, clip, listed, several
from mmdit_lora.files import inside, json_text, kind_of, require_file
from mmdit_lora.layout import Box, BoxError, Clipped, Layout, boxes_of_line, read_json_records, reading_of
from mmdit_lora.outputs import new_folder

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
COLUMNS = ("file_name", "caption", "objects", "bbox_format", "bbox_units")
_REQUIRED = {
    "file_name": "name the image, relative to the folder",
    "caption": "give the text of the whole image",
    "objects": 'give {"bbox": [...], "phrase": [...]}; both lists empty for an image without boxes',
}
# Most names: a path below the folder, without what `inside` looks for.
_PLAIN_NAME = re.compile(r"(?!/)(?!.*\.\.)[^\\:\0]+")
_PLACES_SHOWN = 3  # of each kind of warning
_SIZED = 200  # images whose sizes are read, for readings in pixels

Item = tuple[str, Image.Image | Path, Layout]


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its layout.

    Args:
        image: path of the image.
        location: `file:line` that the record comes from, for messages.
        extra: names of the line's columns that mean nothing here.
    """

    image: Path
    layout: Layout
    location: str
    extra: tuple[str, ...] = field(default=())

    def load(self) -> Image.Image:
        """The image, upright RGB. Raises `InputError` with the record's place where it cannot be read."""
        try:
            return load_image(self.image)
        except InputError as error:
            raise error.at(self.location) from None

    @property
    def name(self) -> str:
        """The image's file name, without folders."""
        return self.image.name

    @property
    def file(self) -> Path | None:
        """The image's file; None where it lies in a shard or is generated."""
        return self.image

    @property
    def stamp(self) -> int | str:
        """What differs where the image does, without reading it: its file's size in bytes, or what it is generated from."""
        return self.image.stat().st_size

    def source(self) -> Path | bytes:
        """What Pillow opens. Raises `InputError` with the record's place where there is nothing to open."""
        return self.file or self.read_bytes()

    def read_bytes(self) -> bytes:
        """The image's file. Raises `InputError` with the record's place where it cannot be read."""
        try:
            return image_bytes(self.image)
        except InputError as error:
            raise error.at(self.location) from None

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright image in pixels, from its header. Raises `InputError` where it is no image."""
        try:
            return image_size(self.image)
        except InputError as error:
            raise error.at(self.location) from None


class Warnings:
    """Collects what disagreed in a set and what was taken instead: a line for the first few of each kind, one for the rest."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}
        self._notes: list[str] = []
        self.edges = EdgeCount()

    def add(self, kind: str, location: str, what: str) -> None:
        """Note one place. `kind`: what such places are, in the plural, e.g. "annotations that state no size"."""
        self._by_kind.setdefault(kind, []).append(f"{location}: {what}")

    def note(self, line: str) -> None:
        """Note something of the set as a whole."""
        self._notes.append(line)

    def clipped(self, by: float, location: str) -> None:
        """Count a box that left its image by this share of the side and was clipped."""
        self.edges.add(by, location)

    def lines(self) -> list[str]:
        """What is of the whole set; the first places of each kind, then a sum of the others; one line of clipped boxes."""
        result = list(self._notes)
        for kind, places in self._by_kind.items():
            result += places[:_PLACES_SHOWN]
            if len(places) > _PLACES_SHOWN:
                result.append(f"{len(places) - _PLACES_SHOWN} more {kind} ({len(places)} in all)")
        return [*result, self.edges.message] if self.edges.message else result


def warn(line: str) -> None:
    """A warning of a reader, where its caller has no other place for it."""
    log.warning("warning: %s", line)


def read_dataset(
    folder: str | Path,
    *,
    bbox_format: str = "xyxy",
    bbox_units: str = "relative",
    on_warning: Callable[[str], None] = warn,
) -> list[Record]:
    """The records of a data set folder. Images are not decoded; for boxes in pixels their headers are read.

    Args:
        bbox_format: "xyxy" | "xywh" | "cxcywh", for lines that do not say it.
        bbox_units: "relative" | "pixel" | "permille", likewise.
        on_warning: called with a line for people for what was read otherwise than it stands (boxes clipped at the edge).

    Raises:
        InputError: what is wrong, the first lines of many with their place in `metadata.jsonl`; and where boxes are wrong,
            how many would be under each reading.
    """
    warnings = Warnings()
    conventions = {"bbox_format": bbox_format, "bbox_units": bbox_units}
    records, errors = scan_dataset(folder, **conventions, warnings=warnings)
    if errors:
        raise several(errors, location=str(folder), hint=reading_hint(folder, errors, **conventions))
    for line in warnings.lines():
        on_warning(f"{folder}: {line}")
    return records


def scan_dataset(
    folder: str | Path,
    *,
    bbox_format: str = "xyxy",
    bbox_units: str = "relative",
    warnings: Warnings | None = None,
) -> tuple[list[Record], list[InputError]]:
    """As `read_dataset`, but goes on past wrong lines and returns their errors too.

    Args:
        warnings: where what was read otherwise than it stands is noted.

    Raises:
        InputError: there is no data set to read at all.
    """
    path, warnings = find_metadata(Path(folder)), warnings or Warnings()
    if path.parent != Path(folder):
        warnings.note(f"has no {METADATA}; the one in its folder {path.parent.name} was read")
    records: list[Record] = []
    errors: list[InputError] = []
    for location, data in read_json_records(path, what="metadata file"):
        clipped: Clipped = []
        try:
            if isinstance(data, InputError):
                raise data
            records.append(_record(data, path.parent, location, bbox_format, bbox_units, clipped))
        except InputError as error:
            errors.append(error if error.location == location else error.at(location))
            continue
        for by, place in clipped:
            warnings.clipped(by, f"{METADATA}{location.removeprefix(str(path))}: {place}")
    if not records and not errors:
        raise InputError("holds no image", location=str(path), hint="write one JSON object a line, one line an image")
    return records, errors


def find_metadata(folder: Path) -> Path:
    """The `metadata.jsonl` of a data set folder; where it has none, that of the one folder in it that has.

    Raises:
        InputError: no such folder, no such file, or several folders have one.
    """
    if not folder.is_dir():
        raise InputError("no such data set folder", location=str(folder), hint=f"give a folder that holds {METADATA}")
    path = folder / METADATA
    if path.exists():
        return require_file(path, what="metadata file")
    deeper = sorted(found for found in folder.glob(f"*/{METADATA}") if found.is_file() and found.parent.name[0] != ".")
    has_tar = any(folder.glob("*.tar"))
    if len(deeper) == 1 and not has_tar:
        return deeper[0]
    what, hint = (
        f"has no {METADATA}",
        f"a data set holds {METADATA}; `mmdit-lora data formats` lists what can be converted",
    )
    if deeper:
        what += f", and {len(deeper)} of its folders have one"
        hint = f"give one of them: {listed(found.parent for found in deeper)}"
    elif (folder / "Annotations").is_dir():
        hint = "it looks like Pascal VOC: `mmdit-lora data convert --from voc`"
    elif has_tar:
        hint = (
            "its tar shards are read by `train` and by `data check|stats|show|cache`; elsewhere give the folder they "
            "were made from"
        )
    raise InputError(what, location=str(folder), hint=hint)


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
        data: `caption`, `objects`, perhaps `bbox_format` and `bbox_units`; other keys are ignored.
        size: called for (width, height) in pixels where boxes are in pixels, or leave their image.
        clipped: is filled with the boxes that left their image by little and were clipped.

    Raises:
        InputError: the first thing that is wrong, with the key but without the file.
    """
    _check_columns(data, ("caption", "objects"))
    reading = reading_of(data, Reading(bbox_format, bbox_units))
    boxes = boxes_of_line(data["objects"], reading, size, clipped)
    return Layout(caption=_text(data["caption"], "caption"), boxes=boxes)


def write_dataset(out: str | Path, items: Iterable[Item], *, verb: str = "write_dataset") -> Path:
    """Write (file name, image or the path of one to copy, layout) as a data set folder, all of it or nothing.

    An image that is given by path is decoded once, so that no damaged one is passed on. Boxes are written as relative
    xyxy with 6 digits. Several layouts of one image repeat its file name.

    Raises:
        InputError: `out` holds something else than an earlier data set, a file name leaves the folder, or an image
            cannot be read.
    """
    return write_splits(out, {"": items}, verb=verb)


def write_splits(out: str | Path, splits: Mapping[str, Iterable[Item]], *, verb: str = "write_splits") -> Path:
    """As `write_dataset`, for several data sets in subfolders of `out` (name -> items), all of them or none."""
    with new_folder(out, verb=verb) as folder:
        for name, items in splits.items():
            fill_dataset(folder / name, items)
    return Path(out).resolve()


def fill_dataset(folder: Path, items: Iterable[Item]) -> None:
    """As `write_dataset`, into a new folder that the caller makes appear only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image, layout in items:
        target = folder / _inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if isinstance(image, Path):
                load_image(image)
                shutil.copyfile(image, target)
            else:
                image.save(target)
        lines.append(json_text({"file_name": name, **layout_columns(layout)}) + "\n")
    if not lines:
        raise InputError("there is no image to write", hint="a data set holds at least one image")
    (folder / METADATA).write_text("".join(lines), encoding="utf-8")


def layout_columns(layout: Layout) -> dict[str, Any]:
    """`caption` and `objects` of a line: relative xyxy with 6 digits, which `parse_layout` reads."""
    objects = {"bbox": [_rounded(b) for b in layout.boxes], "phrase": [b.phrase for b in layout.boxes]}
    return {"caption": layout.caption, "objects": objects}


@dataclass(frozen=True)
class Written:
    """One line's boxes, four numbers each, as they stand.

    Args:
        reading: how they are declared.
        declared: (width, height) that columns of the line say, if any. size: of the image, upright, where it was read.
    """

    location: str
    image: Path
    reading: Reading
    numbers: tuple[Four, ...]
    declared: tuple[float, float] | None = None
    size: tuple[int, int] | None = None


def read_written(folder: str | Path, *, bbox_format: str, bbox_units: str) -> list[Written]:
    """Boxes of every line that can be made out, right or wrong. Nothing is raised for what is wrong: the reader does."""
    path, default = find_metadata(Path(folder)), Reading(bbox_format, bbox_units)
    lines = (_written(data, at, path.parent, default) for at, data in read_json_records(path, what="metadata file"))
    return [line for line in lines if line is not None]


def _written(data: Any, location: str, folder: Path, default: Reading) -> Written | None:
    try:
        reading = reading_of(data, default)
        numbers = tuple(four for value in data["objects"]["bbox"] if (four := four_numbers(value)))
        image = folder / str(data["file_name"]).replace("\\", "/")
        width, height = (next((data[k] for k in (s, f"image_{s}") if k in data), None) for s in ("width", "height"))
        declared = None if width is None or height is None else (float(width), float(height))
        if len(numbers) < len(data["objects"]["bbox"]) or ".." in image.parts:
            return None
        size = image_size(image) if reading.unit == "pixel" or declared else None
    except (InputError, ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError):
        return None
    return Written(location, image, reading, numbers, declared, size)


def set_evidence(lines: Sequence[Written]) -> Evidence | None:
    """The boxes under each reading; None where there are none, or lines declare different readings.

    Where boxes are wrong as declared, the sizes of some images are read, for readings in pixels.
    """
    lines = [line for line in lines if line.numbers]
    declared = {line.reading for line in lines}
    if len(declared) != 1:
        return None
    (reading,) = declared
    found = evidence((Boxed(line.numbers, line.size) for line in lines), reading)
    if found is None or not found.wrong[reading] or reading.unit == "pixel":
        return found
    step = -(-len(lines) // _SIZED)
    sized = (_with_size(line) if number % step == 0 else line for number, line in enumerate(lines))
    return evidence((Boxed(line.numbers, line.size) for line in sized), reading)


def _with_size(line: Written) -> Written:
    try:
        return line if line.size else replace(line, size=image_size(line.image))
    except InputError:
        return line


def reading_hint(folder: str | Path, errors: Iterable[InputError], *, bbox_format: str, bbox_units: str) -> str | None:
    """What explains the errors of a folder's boxes, if any are: see `evidence_hint`."""
    if not any(isinstance(error, BoxError) for error in errors):
        return None
    return evidence_hint(set_evidence(read_written(folder, bbox_format=bbox_format, bbox_units=bbox_units)))


def evidence_hint(found: Evidence | None) -> str | None:
    """What stands beside an error of boxes of a data set (`Evidence.beside_error`), and where to declare it."""
    if found is None or found.beside_error is None:
        return None
    if not found.hint:
        return found.beside_error
    places = "on the lines, in the config as data.bbox_format and data.bbox_units, or with --bbox-format, --bbox-units"
    return f"{found.beside_error} ({places})"


def _record(data: Any, folder: Path, location: str, bbox_format: str, bbox_units: str, clipped: Clipped) -> Record:
    _check_columns(data, COLUMNS[:3])
    _text(data["caption"], "caption")
    image = _image(data["file_name"], folder)
    conventions = {"bbox_format": bbox_format, "bbox_units": bbox_units}
    layout = parse_layout(data, partial(image_size, image), **conventions, clipped=clipped)
    return Record(image, layout, location, tuple(str(key) for key in data if key not in COLUMNS))


def _check_columns(data: Any, columns: Sequence[str]) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", hint=f"its keys are {', '.join(columns)}")
    for key in columns:
        if key not in data:
            raise InputError(f"{key!r} is missing", hint=_REQUIRED[key])


def _text(value: Any, location: str) -> str:
    """`value`, if it is a text that can be written as UTF-8. Raises `InputError` at `location`."""
    if not isinstance(value, str):
        raise InputError(f"is {clip(json.dumps(value), 80)}, not a text", location=location)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        what = f"holds half a character ({value!r})"
        raise InputError(what, location=location, hint="write the text as UTF-8") from None
    return value


def _inside(name: Any) -> str:
    """`name` if it is a relative path that stays in its folder."""
    text = _text(name, "file_name")
    if not _PLAIN_NAME.fullmatch(text) or not text.strip():
        try:
            inside(".", text, location="file_name", what="image")
        except InputError as error:
            raise InputError(f"file_name is {text!r}", hint=error.hint) from None
    return text


def _image(name: Any, folder: Path) -> Path:
    """The regular file of that name, or that a link of that name points to.

    A name with backslashes, as Windows writes paths, is read with slashes where only that file exists.
    """
    text = _inside(name)
    shown = clip(repr(text), 200)
    for spelling in dict.fromkeys((text, text.replace("\\", "/"))):
        path = f"{folder}/{spelling}"
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - half of the time of reading a set would go into Path.stat
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # a name too long, a loop of links
            raise InputError(f"file_name {shown} cannot be opened ({error.strerror})") from None
        if not stat.S_ISREG(mode):
            raise InputError(f"the image {shown} is {kind_of(mode)}", hint="name a regular file, or a link to one")
        return Path(path)
    if os.path.islink(f"{folder}/{text}"):  # noqa: PTH114 - as above
        raise InputError(f"the image {shown} is a link to a file that does not exist", hint="restore that file")
    raise InputError(f"the image {shown} does not exist", hint=f"file_name is relative to {folder}")


def _rounded(box: Box) -> list[float]:
    left, top, right, bottom = (round(value, 6) for value in box.xyxy)
    # A box thinner than the last digit would be read back as empty.
    return [left, top, right, bottom] if left < right and top < bottom else list(box.xyxy)
