"""Boxes of a data set as they stand in its file, right or wrong: the evidence whether they are read as they are meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdit_lora.boxes import Boxed, Evidence, Four, Reading, evidence, four_numbers
from mmdit_lora.data.images import image_size
from mmdit_lora.data.metadata import find_metadata, metadata_records
from mmdit_lora.errors import InputError
from mmdit_lora.layout import reading_of

_WIDTHS, _HEIGHTS = ("width", "image_width"), ("height", "image_height")
_LOOKED_AT = 200  # images, for readings in pixels


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
    path = find_metadata(Path(folder))
    default = Reading(bbox_format, bbox_units)
    read = (_line(data, location, path.parent, default) for location, data in metadata_records(Path(folder)))
    return [written for written in read if written is not None]


def _line(data: Any, location: str, folder: Path, default: Reading) -> Written | None:
    try:
        reading = reading_of(data, default)
        numbers = [four_numbers(value) for value in data["objects"]["bbox"]]
        image = folder / str(data["file_name"]).replace("\\", "/")
        declared = _declared(data)
        if None in numbers or ".." in image.parts:
            return None
        size = image_size(image) if reading.unit == "pixel" or declared else None
    except (InputError, ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError):
        return None
    return Written(location, image, reading, tuple(four for four in numbers if four is not None), declared, size)


def _declared(data: Mapping[str, Any]) -> tuple[float, float] | None:
    width = next((data[key] for key in _WIDTHS if key in data), None)
    height = next((data[key] for key in _HEIGHTS if key in data), None)
    return None if width is None or height is None else (float(width), float(height))


def set_evidence(lines: Sequence[Written]) -> Evidence | None:
    """The boxes under each reading; None where there are none, or lines declare different readings.

    Where boxes are wrong as declared, the sizes of some images are read, for readings in pixels.
    """
    lines = [line for line in lines if line.numbers]
    declared = {line.reading for line in lines}
    if len(declared) != 1:
        return None
    (reading,) = declared
    found = evidence(_boxed(lines), reading)
    if found is None or not found.wrong[reading] or reading.unit == "pixel":
        return found
    step = -(-len(lines) // _LOOKED_AT)
    looked = [_sized(line) if number % step == 0 else line for number, line in enumerate(lines)]
    return evidence(_boxed(looked), reading)


def _boxed(lines: Iterable[Written]) -> Iterable[Boxed]:
    return (Boxed(line.numbers, line.size) for line in lines)


def _sized(line: Written) -> Written:
    try:
        return line if line.size else replace(line, size=image_size(line.image))
    except InputError:
        return line


def hint(found: Evidence | None) -> str | None:
    """What stands beside an error of boxes of a data set (`Evidence.beside_error`), and where to declare it."""
    if found is None or found.beside_error is None:
        return None
    location = (
        " (on the lines, in the config as data.bbox_format and data.bbox_units, or with --bbox-format, --bbox-units)"
    )
    return found.beside_error + location * bool(found.hint)
