"""What is in a data set and what is wrong with it, before a run is spent on it."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.data.records import COLUMNS, BoxFormatError, Record
from mmdit_lora.errors import InputError

TINY = 0.01  # of the picture's side
# With fewer boxes, that all lie in the upper left quarter may be chance.
ENOUGH_FOR_FORMAT = 12


@dataclass(frozen=True)
class CheckReport:
    """Plain data; `to_dict` is what `data check --json` prints.

    Args:
        records: lines that could be read. pictures: distinct files among them.
        image_sizes: "WIDTHxHEIGHT" -> how many pictures, the most frequent first.
        boxes_per_picture: number of boxes -> how many records.
        tiny_boxes: boxes less than 1 % of a side wide or high.
        duplicate_records: lines that repeat an earlier one. duplicate_pictures: files with the bytes of another one.
        extra_columns: column that means nothing here -> in how many lines.
        left_out: what a converting reader left out, by reason.
        errors, warnings: messages. An error stops a run, a warning does not.
    """

    records: int
    pictures: int
    boxes: int
    phrases: int
    image_sizes: dict[str, int]
    boxes_per_picture: dict[int, int]
    tiny_boxes: int
    undecodable_images: int
    duplicate_records: int
    duplicate_pictures: int
    extra_columns: dict[str, int]
    left_out: dict[str, int]
    errors: list[str]
    warnings: list[str]

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def check_dataset(
    records: Iterable[Record], *, errors: Sequence[InputError] = (), left_out: dict[str, int] | None = None
) -> CheckReport:
    """Look at every record and decode every picture once.

    Args:
        errors: what the reader could not read (`scan_dataset`).
        left_out: what it left out, by reason (`scan_voc`).
    """
    records = list(records)
    pictures = _decode({record.image: record for record in records}.values())
    messages = [str(error) for error in errors] + pictures.errors
    boxes = [box for record in records for box in record.layout.boxes]
    tiny = sum(box.width < TINY or box.height < TINY for box in boxes)
    seen = Counter((record.image, record.layout) for record in records)
    repeated = sum(count - 1 for count in seen.values())
    extra = Counter(column for record in records for column in record.extra)
    warnings = [
        *_format_warnings(records, errors),
        *_column_warnings(extra),
        *_if(tiny, f"{tiny} of {len(boxes)} boxes are less than 1 % of the picture wide or high"),
        *_if(repeated, f"{repeated} records repeat an earlier one, picture and layout"),
        *_if(pictures.same, f"{pictures.same} pictures have the same bytes as another one"),
        *_if(
            n := sum(not r.layout.boxes for r in records),
            f"{n} records have no box: the layout stream learns nothing there",
        ),
        *_if(n := sum(not r.layout.caption.strip() for r in records), f"{n} records have an empty caption"),
        *(f"{count} {what} were left out" for what, count in (left_out or {}).items()),
    ]
    return CheckReport(
        records=len(records),
        pictures=len({record.image for record in records}),
        boxes=len(boxes),
        phrases=len({box.phrase for box in boxes}),
        image_sizes=dict(pictures.sizes.most_common()),
        boxes_per_picture=dict(sorted(Counter(len(record.layout.boxes) for record in records).items())),
        tiny_boxes=tiny,
        undecodable_images=len(pictures.errors),
        duplicate_records=repeated,
        duplicate_pictures=pictures.same,
        extra_columns=dict(extra),
        left_out=dict(left_out or {}),
        errors=messages,
        warnings=warnings,
    )


@dataclass(frozen=True)
class _Pictures:
    sizes: Counter[str]
    errors: list[str]
    same: int


def _decode(records: Iterable[Record]) -> _Pictures:
    sizes: Counter[str] = Counter()
    errors: list[str] = []
    by_bytes: defaultdict[bytes, list[Path]] = defaultdict(list)
    for record in records:
        try:
            image = record.load()
        except InputError as error:
            errors.append(str(error))
            continue
        sizes[f"{image.width}x{image.height}"] += 1
        by_bytes[hashlib.blake2b(record.image.read_bytes(), digest_size=16).digest()].append(record.image)
    return _Pictures(sizes, errors, sum(len(paths) - 1 for paths in by_bytes.values()))


def _format_warnings(records: Sequence[Record], errors: Sequence[InputError]) -> list[str]:
    """Evidence that boxes are xywh: lines that only xywh explains, or corners that all would be legal sizes.

    In xyxy the right and lower corners reach the far sides of the pictures; sizes added to left and top seldom pass 1.
    """
    fitting = sum(isinstance(error, BoxFormatError) for error in errors)
    boxes = [box.xyxy for record in records for box in record.layout.boxes]
    could_be_sizes = all(left + right <= 1 and top + bottom <= 1 for left, top, right, bottom in boxes)
    if fitting and could_be_sizes:
        return [
            f"{fitting} lines are wrong as xyxy, and every box would be right as xywh: bbox_format is probably xywh"
        ]
    if not fitting and could_be_sizes and len(boxes) >= ENOUGH_FOR_FORMAT:
        return [f"all {len(boxes)} boxes would be right as xywh too, which is rare for xyxy: check bbox_format"]
    return []


def _column_warnings(extra: Counter[str]) -> list[str]:
    near = {column: difflib.get_close_matches(column, COLUMNS, n=1, cutoff=0.8) for column in extra}
    return [f"the column {column!r} is ignored: did you mean {match[0]!r}?" for column, match in near.items() if match]


def _if(condition: int, message: str) -> list[str]:
    return [message] if condition else []
