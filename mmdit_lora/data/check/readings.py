"""Boxes as they are written, under each reading: the evidence whether `bbox_format` is right; and declared sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.data.check.findings import Corners, Example, Finding, finding
from mmdit_lora.data.images import image_size
from mmdit_lora.data.records import BBOX_FORMATS, METADATA, Record
from mmdit_lora.errors import InputError
from mmdit_lora.layout import EDGE_TOLERANCE, numbered_lines, parse_json

# With fewer boxes, that all lie in the upper left quarter may be chance.
ENOUGH_FOR_FORMAT = 12
_WIDTHS, _HEIGHTS = ("width", "image_width"), ("height", "image_height")


@dataclass(frozen=True)
class Written:
    """One line's boxes, four numbers each, relative to the picture's sides but else as they stand.

    Args:
        format: how they are declared.
        declared: (width, height) that columns of the line say, if any. size: of the picture, upright.
    """

    where: str
    image: Path
    format: str
    numbers: tuple[Corners, ...]
    declared: tuple[float, float] | None = None
    size: tuple[int, int] | None = None


def read_written(folder: str | Path, *, bbox_format: str, bbox_units: str) -> list[Written]:
    """Boxes of every line that can be made out, right or wrong. Nothing is raised for what is wrong: the reader does."""
    folder = Path(folder)
    lines = numbered_lines((folder / METADATA).read_text(encoding="utf-8-sig"))
    read = (_line(line, f"{folder / METADATA}:{n}", folder, bbox_format, bbox_units) for n, line in lines)
    return [written for written in read if written is not None]


def _line(line: str, where: str, folder: Path, bbox_format: str, bbox_units: str) -> Written | None:
    try:
        data = parse_json(line, where=where)
        numbers = [tuple(float(v) for v in four) for four in data["objects"]["bbox"]]
        image = folder / data["file_name"]
        format_ = data.get("bbox_format", bbox_format)
        if any(len(four) != 4 or not all(map(math.isfinite, four)) for four in numbers):
            return None
        declared = _declared(data)
        pixel = data.get("bbox_units", bbox_units) == "pixel"
        if format_ not in BBOX_FORMATS or ".." in image.parts:
            return None
        size = image_size(image) if pixel or declared else None
    except (InputError, ValueError, LookupError, TypeError, AttributeError, OverflowError, OSError):
        return None
    width, height = size if pixel and size else (1, 1)
    relative = tuple((a / width, b / height, c / width, d / height) for a, b, c, d in numbers)
    return Written(where, image, format_, relative, declared, size)


def _declared(data: Mapping[str, Any]) -> tuple[float, float] | None:
    width = next((data[key] for key in _WIDTHS if key in data), None)
    height = next((data[key] for key in _HEIGHTS if key in data), None)
    return None if width is None or height is None else (float(width), float(height))


def as_written(records: Iterable[Record]) -> list[Written]:
    """For readers that convert: the boxes of their records, which are xyxy."""
    return [Written(r.where, r.image, "xyxy", tuple(box.xyxy for box in r.layout.boxes)) for r in records]


def as_corners(four: Corners, format_: str) -> Corners:
    """xyxy of four numbers that are read as `format_`."""
    a, b, c, d = four
    if format_ == "xywh":
        return (a, b, a + c, b + d)
    if format_ == "cxcywh":
        return (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    return four


def fits(four: Corners) -> bool:
    """Whether xyxy lies in the picture and is neither inverted nor empty."""
    left, top, right, bottom = four
    return min(four) >= -EDGE_TOLERANCE and max(four) <= 1 + EDGE_TOLERANCE and left < right and top < bottom


def shares_outside(lines: Sequence[Written]) -> dict[str, float]:
    """Reading -> share of all boxes that leave their picture, or are inverted, under it."""
    boxes = [four for line in lines for four in line.numbers]
    if not boxes:
        return {}
    return {name: sum(not fits(as_corners(four, name)) for four in boxes) / len(boxes) for name in BBOX_FORMATS}


def evidence_line(lines: Sequence[Written]) -> str:
    """The shares as one sentence, or nothing where there are no boxes."""
    shares, declared = shares_outside(lines), sorted({line.format for line in lines})
    if not shares:
        return ""
    parts = [f"{share:.1%} as {name}{' (declared)' if name in declared else ''}" for name, share in shares.items()]
    return f"boxes that leave their picture or are inverted: {', '.join(parts)}"


def reading_findings(lines: Sequence[Written], only_xywh: int) -> list[Finding]:
    """Whether another reading explains the boxes better than the declared one, and sizes that are not the pictures'.

    In xyxy the right and lower corners reach the far sides of the pictures; sizes added to left and top seldom pass 1.

    Args:
        only_xywh: how many lines the reader refused and would have taken as xywh.
    """
    return [*_format(lines, only_xywh), *_sizes(lines)]


def _format(lines: Sequence[Written], only_xywh: int) -> list[Finding]:
    declared = {line.format for line in lines}
    if len(declared) != 1:
        return []  # every line says its own: no one reading to doubt
    (said,) = declared
    shares = shares_outside(lines)
    count = sum(len(line.numbers) for line in lines)
    if not shares:
        return []
    wrong = round(shares[said] * count)
    better = min(BBOX_FORMATS, key=lambda name: shares[name])
    evidence, name = evidence_line(lines), "box-format"
    cure = "look at the boxes below; set bbox_format on the lines or in the config if another reading is right"
    if only_xywh and shares["xywh"] == 0:
        better = "xywh"
        message = (
            f"{only_xywh} lines are wrong as xyxy, and every box would be right as xywh: bbox_format is probably xywh"
        )
    elif wrong and better != said and shares[better] < shares[said] / 4:
        message = f"{wrong} of {count} boxes are wrong as {said}, {shares[better]:.1%} as {better}: bbox_format is probably {better}"
    elif said == "xyxy" and not wrong and not only_xywh and shares["xywh"] == 0 and count >= ENOUGH_FOR_FORMAT:
        better = "xywh"
        message = f"all {count} boxes would be right as xywh too, which is rare for xyxy: check bbox_format"
    else:
        return []
    ordered = sorted(lines, key=lambda line: all(fits(as_corners(four, said)) for four in line.numbers))
    examples = [
        Example(
            line.where,
            f"red as {said}, blue as {better}: {_few(line)}",
            line.image,
            tuple(as_corners(four, said) for four in line.numbers),
            tuple(as_corners(four, better) for four in line.numbers),
        )
        for line in ordered
        if line.numbers
    ]
    message = f"{message} ({evidence})"
    return finding(name, message, cure, examples, total=count, unit="boxes", count=wrong or only_xywh or count)


def _sizes(lines: Sequence[Written]) -> list[Finding]:
    examples = []
    for line in lines:
        if line.declared and line.size and line.declared != line.size:
            turned = "; the sides are swapped, as EXIF rotation does" if line.declared == line.size[::-1] else ""
            said, has = (f"{w:g} x {h:g}" for w, h in (line.declared, line.size))
            text = f"declared {said}, the picture has {has} upright{turned}"
            examples.append(Example(line.where, text, line.image))
    return finding(
        "declared-size",
        "{n} lines declare another size than their picture has",
        "check that each line belongs to its picture, and to this size of it: boxes in pixels would be wrong",
        examples,
        total=len(lines),
        unit="records",
    )


def _few(line: Written) -> str:
    return ", ".join(str([round(v, 3) for v in four]) for four in line.numbers[:3])
