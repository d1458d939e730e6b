"""The data set format: a folder with `metadata.jsonl`, one picture with its layout a line (Hugging Face's imagefolder).

    {"file_name": "1.png", "caption": "...", "objects": {"bbox": [[x0, y0, x1, y1], ...], "phrase": ["...", ...]}}

A line may hold `bbox_format` and `bbox_units`; whatever they are, a `Record` has boxes as the rest of the package knows
them. `write_dataset` is the inverse.
"""

from __future__ import annotations

import json
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.lines import (
    BBOX_FORMATS,
    BBOX_UNITS,
    COLUMNS,
    MISSING,
    BoxFormatError,
    parse_layout,
    text_of,
)
from mmdit_lora.errors import InputError
from mmdit_lora.files import atomic_folder
from mmdit_lora.layout import Box, Layout, numbered_lines, parse_json

__all__ = ["BBOX_FORMATS", "BBOX_UNITS", "COLUMNS", "METADATA", "BoxFormatError", "Item", "Record"]

METADATA = "metadata.jsonl"

Item = tuple[str, Image.Image | Path, Layout]


@dataclass(frozen=True)
class Record:
    """One picture and its layout.

    Args:
        image: path of the picture.
        where: `file:line` that the record comes from, for messages.
        extra: names of the line's columns that mean nothing here.
    """

    image: Path
    layout: Layout
    where: str
    extra: tuple[str, ...] = field(default=())

    def load(self) -> Image.Image:
        """The picture, upright RGB. Raises `InputError` with the record's place where it cannot be read."""
        try:
            return load_image(self.image)
        except InputError as error:
            raise error.at(self.where) from None

    @property
    def name(self) -> str:
        """The picture's file name, without folders."""
        return self.image.name

    def source(self) -> Path | bytes:
        """What Pillow opens. Raises `InputError` with the record's place where there is nothing to open."""
        return self.image

    def read_bytes(self) -> bytes:
        """The picture's file. Raises `InputError` with the record's place where it cannot be read."""
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise InputError(
                f"the picture {self.image} cannot be read ({error.strerror})",
                where=self.where,
                cure="restore the file, or leave the record out",
            ) from None

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture in pixels, from its header. Raises `InputError` where it is no picture."""
        try:
            return image_size(self.image)
        except InputError as error:
            raise error.at(self.where) from None


def read_dataset(folder: str | Path, *, bbox_format: str = "xyxy", bbox_units: str = "relative") -> list[Record]:
    """The records of a data set folder. Pictures are not decoded; for boxes in pixels their headers are read.

    Args:
        bbox_format: "xyxy" | "xywh" | "cxcywh", for lines that do not say it.
        bbox_units: "relative" | "pixel", likewise.

    Raises:
        InputError: the first thing that is wrong, with `metadata.jsonl:LINE`.
    """
    records = []
    for read in _scan(Path(folder), bbox_format, bbox_units):
        if isinstance(read, InputError):
            raise read
        records.append(read)
    return records


def scan_dataset(
    folder: str | Path, *, bbox_format: str = "xyxy", bbox_units: str = "relative"
) -> tuple[list[Record], list[InputError]]:
    """As `read_dataset`, but goes on past wrong lines and returns their errors too.

    Raises:
        InputError: there is no data set to read at all.
    """
    reads = list(_scan(Path(folder), bbox_format, bbox_units))
    return [r for r in reads if isinstance(r, Record)], [r for r in reads if isinstance(r, InputError)]


def write_dataset(out: str | Path, items: Iterable[Item]) -> Path:
    """Write (file name, picture or the path of one to copy, layout) as a data set folder, all of it or nothing.

    A picture that is given by path is decoded once, so that no damaged one is passed on. Boxes are written as relative
    xyxy with 6 digits. Several layouts of one picture repeat its file name.

    Raises:
        InputError: `out` holds something else than an earlier data set, a file name leaves the folder, or a picture
            cannot be read.
    """
    out = Path(out).resolve()
    check_replaceable(out)
    with atomic_folder(out) as folder:
        fill_dataset(folder, items)
    return out


def write_splits(out: str | Path, splits: Mapping[str, Iterable[Item]]) -> Path:
    """As `write_dataset`, for several data sets in subfolders of `out` (name -> items), all of them or none."""
    out = Path(out).resolve()
    check_replaceable(out, parts=tuple(splits))
    with atomic_folder(out) as folder:
        for name, items in splits.items():
            fill_dataset(folder / name, items)
    return out


def fill_dataset(folder: Path, items: Iterable[Item]) -> None:
    """As `write_dataset`, into a new folder that the caller makes appear only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, picture, layout in items:
        target = folder / _inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            if isinstance(picture, Path):
                load_image(picture)
                shutil.copyfile(picture, target)
            else:
                picture.save(target)
        lines.append({"file_name": name, **layout_columns(layout)})
    if not lines:
        raise InputError("there is no picture to write", cure="a data set holds at least one picture")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")


def layout_columns(layout: Layout) -> dict[str, Any]:
    """`caption` and `objects` of a line: relative xyxy with 6 digits, which `parse_layout` reads."""
    objects = {"bbox": [_rounded(b) for b in layout.boxes], "phrase": [b.phrase for b in layout.boxes]}
    return {"caption": layout.caption, "objects": objects}


def check_replaceable(out: Path, *, parts: tuple[str, ...] = ()) -> None:
    """Refuse to replace anything but nothing, an empty folder, or a data set (with nothing else beside it).

    Args:
        parts: names of subfolders that may be data sets themselves.

    Raises:
        InputError: `out` is a file, or holds something that replacing it would destroy.
    """
    if not out.exists():
        return
    cure = "give another --out, or remove it yourself"
    if not out.is_dir():
        raise InputError("is a file, not a folder", where=str(out), cure=cure)
    ours = set(parts)
    for part in parts:
        check_replaceable(out / part)
    if (out / METADATA).is_file():
        try:
            lines = [
                parse_json(line, where=METADATA) for _, line in numbered_lines((out / METADATA).read_text("utf-8"))
            ]
            ours |= {METADATA, *(PurePosixPath(line["file_name"]).parts[0] for line in lines)}
        except (InputError, UnicodeDecodeError, LookupError, TypeError):
            ours = set(parts)
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise InputError(
            f"is not empty, and no data set alone (it holds {', '.join(others[:3])}{' ...' if others[3:] else ''})",
            where=str(out),
            cure=cure,
        )


def _scan(folder: Path, bbox_format: str, bbox_units: str) -> Iterator[Record | InputError]:
    text = _metadata(folder)
    path, root, found = folder / METADATA, folder.resolve(), False
    for number, line in numbered_lines(text):
        found, where = True, f"{path}:{number}"
        try:
            data = parse_json(line, where="")
            yield _record(data, root, folder, where, bbox_format, bbox_units)
        except InputError as error:
            yield error.at(where)
        except ValueError as error:  # an integer of more digits than Python converts
            yield InputError(f"is not JSON: {error}", where=where)
    if not found:
        raise InputError("holds no picture", where=str(path), cure="write one JSON object a line, one line a picture")


def _metadata(folder: Path) -> str:
    if not folder.is_dir():
        raise InputError("no such data set folder", where=str(folder), cure=f"give a folder that holds {METADATA}")
    path = folder / METADATA
    if not path.is_file():
        raise InputError(f"has no {METADATA}", where=str(folder), cure=_cure_without_metadata(folder))
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot be read as UTF-8 text ({error})", where=str(path)) from None


def _cure_without_metadata(folder: Path) -> str:
    if (folder / "Annotations").is_dir():
        return "it looks like Pascal VOC: `mmdit-lora data convert --from voc`"
    if any(folder.glob("*.tar")):
        return "its tar shards are read by `train` and by `data check|stats|show|cache`; elsewhere give the folder they were made from"
    return f"a data set holds {METADATA}; `mmdit-lora data formats` lists what can be converted"


def _record(data: Any, root: Path, folder: Path, where: str, bbox_format: str, bbox_units: str) -> Record:
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", cure=f"its keys are {', '.join(COLUMNS[:3])}")
    for key in COLUMNS[:3]:
        if key not in data:
            raise InputError(f"{key!r} is missing", cure=MISSING[key])
    text_of(data["caption"], "caption")
    image = _picture(data["file_name"], root, folder)
    layout = parse_layout(data, partial(image_size, image), bbox_format=bbox_format, bbox_units=bbox_units)
    return Record(image=image, layout=layout, where=where, extra=tuple(str(key) for key in data if key not in COLUMNS))


def _inside(name: Any) -> str:
    """`name` if it is a relative path that stays in its folder."""
    text = text_of(name, "file_name")
    windows = PureWindowsPath(text)
    if not text.strip() or "\0" in text or PurePosixPath(text).is_absolute() or windows.drive or ".." in windows.parts:
        raise InputError(f"file_name is {text!r}", cure="give a path below the data set folder, without '..'")
    return text


def _picture(name: Any, root: Path, folder: Path) -> Path:
    path = folder / _inside(name)
    try:
        if not path.resolve().is_relative_to(root):
            raise InputError(
                f"file_name {name!r} is a link that leaves the data set folder", cure="copy the picture into the folder"
            )
        if path.is_file():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise InputError(f"file_name {reprlib.repr(name)} cannot be opened ({reason})") from None
    raise InputError(f"the picture {name!r} does not exist", cure=f"file_name is relative to {folder}")


def _rounded(box: Box) -> list[float]:
    left, top, right, bottom = (round(value, 6) for value in box.xyxy)
    # A box thinner than the last digit would be read back as empty.
    return [left, top, right, bottom] if left < right and top < bottom else list(box.xyxy)
