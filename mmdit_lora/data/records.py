"""The data set format: a folder with `metadata.jsonl`, one picture with its layout a line (Hugging Face's imagefolder).

    {"file_name": "1.png", "caption": "...", "objects": {"bbox": [[x0, y0, x1, y1], ...], "phrase": ["...", ...]}}

A line may hold `bbox_format` and `bbox_units`; whatever they are, a `Record` has boxes as the rest of the package knows
them. `write_dataset` is the inverse.
"""

from __future__ import annotations

import json
import math
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.files import atomic_folder
from mmdit_lora.layout import Box, Layout, numbered_lines, parse_json

METADATA = "metadata.jsonl"
BBOX_FORMATS = ("xyxy", "xywh", "cxcywh")
BBOX_UNITS = ("relative", "pixel")
COLUMNS = ("file_name", "caption", "objects", "bbox_format", "bbox_units")
_OBJECTS = ("bbox", "phrase")

Item = tuple[str, Image.Image | Path, Layout]


class BoxFormatError(InputError):
    """Boxes that are wrong as xyxy, and would all be right as xywh."""


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
        objects = {"bbox": [_rounded(b) for b in layout.boxes], "phrase": [b.phrase for b in layout.boxes]}
        lines.append({"file_name": name, "caption": layout.caption, "objects": objects})
    if not lines:
        raise InputError("there is no picture to write", cure="a data set holds at least one picture")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")


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
        voc = (folder / "Annotations").is_dir()
        cure = (
            "it looks like Pascal VOC: `mmdit-lora data convert --from voc`"
            if voc
            else f"a data set holds {METADATA}; `mmdit-lora data formats` lists what can be converted"
        )
        raise InputError(f"has no {METADATA}", where=str(folder), cure=cure)
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot be read as UTF-8 text ({error})", where=str(path)) from None


def _record(data: Any, root: Path, folder: Path, where: str, bbox_format: str, bbox_units: str) -> Record:
    if not isinstance(data, Mapping):
        raise InputError(f"is {type(data).__name__}, not an object", cure=f"its keys are {', '.join(COLUMNS[:3])}")
    for key in COLUMNS[:3]:
        if key not in data:
            raise InputError(f"{key!r} is missing", cure=_MISSING[key])
    caption = _text(data["caption"], "caption")
    image = _picture(data["file_name"], root, folder)
    layout = Layout(
        caption=caption,
        boxes=_boxes(
            data["objects"],
            image,
            _choice(data.get("bbox_format", bbox_format), BBOX_FORMATS, "bbox_format"),
            _choice(data.get("bbox_units", bbox_units), BBOX_UNITS, "bbox_units"),
        ),
    )
    return Record(image=image, layout=layout, where=where, extra=tuple(str(key) for key in data if key not in COLUMNS))


_MISSING = {
    "file_name": "name the picture, relative to the folder",
    "caption": "give the text of the whole picture",
    "objects": 'give {"bbox": [...], "phrase": [...]}; both lists empty for a picture without boxes',
}


def _inside(name: Any) -> str:
    """`name` if it is a relative path that stays in its folder."""
    text = _text(name, "file_name")
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


def _boxes(objects: Any, image: Path, bbox_format: str, bbox_units: str) -> tuple[Box, ...]:
    if not isinstance(objects, Mapping):
        raise InputError(f"objects is {type(objects).__name__}, not an object", cure=_MISSING["objects"])
    for key in objects:
        if key not in _OBJECTS:
            raise unknown_key(key, _OBJECTS, where="objects")
    for key in _OBJECTS:
        if not isinstance(objects.get(key), list):
            what = f"is {type(objects[key]).__name__}, not a list" if key in objects else "is missing"
            raise InputError(what, where=f"objects.{key}", cure=_MISSING["objects"])
    bbox, phrases = objects["bbox"], objects["phrase"]
    if len(bbox) != len(phrases):
        raise InputError(
            f"{len(bbox)} boxes and {len(phrases)} phrases", where="objects", cure="give each box its phrase"
        )
    numbers = [_four_numbers(value, index) for index, value in enumerate(bbox)]
    texts = [_text(value, f"objects.phrase[{index}]") for index, value in enumerate(phrases)]
    width, height = image_size(image) if bbox_units == "pixel" and bbox else (1, 1)
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


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"is {json.dumps(value)[:80]}, not a text", where=where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"holds half a character ({value!r})", where=where, cure="write the text as UTF-8") from None
    return value


def _choice(value: Any, known: tuple[str, ...], key: str) -> str:
    if value not in known:
        raise InputError(f"{key} is {json.dumps(value)[:80]}", cure=f"give one of {', '.join(known)}")
    return str(value)


def _rounded(box: Box) -> list[float]:
    left, top, right, bottom = (round(value, 6) for value in box.xyxy)
    # A box thinner than the last digit would be read back as empty.
    return [left, top, right, bottom] if left < right and top < bottom else list(box.xyxy)
