"""The data set format: a folder with `metadata.jsonl`, one image with its layout a line (Hugging Face's imagefolder).

    {"file_name": "1.png", "caption": "...", "objects": {"bbox": [[x0, y0, x1, y1], ...], "phrase": ["...", ...]}}

A line may hold `bbox_format` and `bbox_units`; whatever they are, a `Record` has boxes as the rest of the package knows
them. `write_dataset` is the inverse.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmdit_lora.data.annotation import BBOX_FORMATS, BBOX_UNITS, COLUMNS, MISSING, parse_layout, text_of
from mmdit_lora.data.images import image_bytes, image_size, load_image
from mmdit_lora.data.metadata import METADATA, find_metadata, metadata_records
from mmdit_lora.data.warnings import Warnings
from mmdit_lora.data.written import hint, read_written, set_evidence
from mmdit_lora.errors import InputError, clip, several
from mmdit_lora.files import inside, json_text, kind_of
from mmdit_lora.layout import Box, BoxError, Clipped, Layout
from mmdit_lora.outputs import new_folder

__all__ = ["BBOX_FORMATS", "BBOX_UNITS", "COLUMNS", "METADATA", "Item", "Record"]

log = logging.getLogger(__name__)

# Most names: a path below the folder, without what `inside` looks for.
_PLAIN_NAME = re.compile(r"(?!/)(?!.*\.\.)[^\\:\0]+")

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


def warn(line: str) -> None:
    """A warning of a reader, where its caller has no other place for it."""
    log.warning("warning: %s", line)


def read_dataset(
    folder: str | Path,
    *,
    bbox_format: str = "xyxy",
    bbox_units: str = "relative",
    tell: Callable[[str], None] = warn,
) -> list[Record]:
    """The records of a data set folder. Images are not decoded; for boxes in pixels their headers are read.

    Args:
        bbox_format: "xyxy" | "xywh" | "cxcywh", for lines that do not say it.
        bbox_units: "relative" | "pixel" | "permille", likewise.
        on_progress: called with a line for people for what was read otherwise than it stands (boxes clipped at the edge).

    Raises:
        InputError: what is wrong, the first lines of many with their place in `metadata.jsonl`; and where boxes are wrong,
            how many would be under each reading.
    """
    warnings = Warnings()
    conventions = {"bbox_format": bbox_format, "bbox_units": bbox_units}
    records, errors = scan_dataset(folder, **conventions, warnings=warnings)
    if errors:
        boxes = any(isinstance(error, BoxError) for error in errors)
        found = set_evidence(read_written(folder, **conventions)) if boxes else None
        raise several(errors, location=str(folder), hint=hint(found))
    for line in warnings.lines():
        tell(f"{folder}: {line}")
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
    records, errors = [], []
    for read in _scan(Path(folder), bbox_format, bbox_units, warnings or Warnings()):
        if isinstance(read, InputError):
            errors.append(read)
        else:
            records.append(read)
    return records, errors


def write_dataset(out: str | Path, items: Iterable[Item], *, verb: str = "write_dataset") -> Path:
    """Write (file name, image or the path of one to copy, layout) as a data set folder, all of it or nothing.

    An image that is given by path is decoded once, so that no damaged one is passed on. Boxes are written as relative
    xyxy with 6 digits. Several layouts of one image repeat its file name.

    Raises:
        InputError: `out` holds something else than an earlier data set, a file name leaves the folder, or an image
            cannot be read.
    """
    with new_folder(out, verb=verb) as folder:
        fill_dataset(folder, items)
    return Path(out).resolve()


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
        lines.append({"file_name": name, **layout_columns(layout)})
    if not lines:
        raise InputError("there is no image to write", hint="a data set holds at least one image")
    text = "".join(json_text(line) + "\n" for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")


def layout_columns(layout: Layout) -> dict[str, Any]:
    """`caption` and `objects` of a line: relative xyxy with 6 digits, which `parse_layout` reads."""
    objects = {"bbox": [_rounded(b) for b in layout.boxes], "phrase": [b.phrase for b in layout.boxes]}
    return {"caption": layout.caption, "objects": objects}


def _scan(folder: Path, bbox_format: str, bbox_units: str, warnings: Warnings) -> Iterator[Record | InputError]:
    path = find_metadata(folder)
    if path.parent != folder:
        warnings.note(f"has no {METADATA}; the one in its folder {path.parent.name} was read")
    found = False
    for location, data in metadata_records(folder):
        found = True
        clipped: Clipped = []
        try:
            if isinstance(data, InputError):
                raise data
            yield _record(data, path.parent, location, bbox_format, bbox_units, clipped)
        except InputError as error:
            yield error if error.location == location else error.at(location)
            continue
        for by, place in clipped:
            warnings.clipped(by, f"{METADATA}{location.removeprefix(str(path))}: {place}")
    if not found:
        raise InputError("holds no image", location=str(path), hint="write one JSON object a line, one line an image")


def _record(data: Any, folder: Path, location: str, bbox_format: str, bbox_units: str, clipped: Clipped) -> Record:
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", hint=f"its keys are {', '.join(COLUMNS[:3])}")
    for key in COLUMNS[:3]:
        if key not in data:
            raise InputError(f"{key!r} is missing", hint=MISSING[key])
    text_of(data["caption"], "caption")
    image = _image(data["file_name"], folder)
    layout = parse_layout(
        data, partial(image_size, image), bbox_format=bbox_format, bbox_units=bbox_units, clipped=clipped
    )
    return Record(
        image=image, layout=layout, location=location, extra=tuple(str(key) for key in data if key not in COLUMNS)
    )


def _inside(name: Any) -> str:
    """`name` if it is a relative path that stays in its folder."""
    text = text_of(name, "file_name")
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
