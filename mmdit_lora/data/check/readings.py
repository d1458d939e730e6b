"""Boxes as they are written, under each reading: the evidence whether `bbox_format` is right; and declared sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmdit_lora.boxes import EDGE_SHARE, Evidence, Reading, relative, told_apart
from mmdit_lora.data.check.findings import Corners, Example, Finding, finding
from mmdit_lora.data.records import Record, Written, read_written

__all__ = ["Written", "as_written", "corners_of", "fits", "read_written", "reading_findings"]

# With fewer boxes, that all lie in the upper left quarter may be chance.
ENOUGH_FOR_FORMAT = 12
_PLAIN = Reading("xyxy", "relative")


def as_written(records: Iterable[Record]) -> list[Written]:
    """For readers that convert: the boxes of their records, which are relative xyxy."""
    return [Written(r.location, r.image, _PLAIN, tuple(box.xyxy for box in r.layout.boxes)) for r in records]


def corners_of(line: Written, reading: Reading | None = None) -> list[Corners]:
    """Relative xyxy of a line's boxes, not clipped, as they are declared or under another reading; none where that needs a
    size that is not known."""
    reading = reading or line.reading
    if reading.unit == "pixel" and line.size is None:
        return []
    return [relative(four, reading, line.size) for four in line.numbers]


def fits(four: Corners) -> bool:
    """Whether relative xyxy lies in the image (or is clipped to it), and is neither inverted nor empty."""
    left, top, right, bottom = four
    return min(four) >= -EDGE_SHARE and max(four) <= 1 + EDGE_SHARE and left < right and top < bottom


def reading_findings(lines: Sequence[Written], found: Evidence | None) -> list[Finding]:
    """Whether another reading explains the boxes better than the declared one, and sizes that are not the images'.

    In xyxy the right and lower corners reach the far sides of the images; sizes added to left and top seldom pass 1.

    Args:
        found: the boxes of the lines under each reading (`set_evidence`).
    """
    return [*_format(lines, found), *_sizes(lines)]


def _format(lines: Sequence[Written], found: Evidence | None) -> list[Finding]:
    if found is None:
        return []  # every line says its own: no one reading to doubt
    said, wrong, total = found.declared, found.wrong[found.declared], found.total
    if found.proposed:
        better = found.proposed[0]
        names = " or ".join(found.name(reading) for reading in found.proposed)
        message = f"{wrong} of {total} boxes are wrong as {said.order}, {found.wrong[better]} as {names}: the boxes are probably {names}"
        hint = f"look at the boxes below; {found.hint}"
    elif said.order == "xyxy" and not wrong and not found.wrong[Reading("xywh", said.unit)] and _enough(lines):
        better = Reading("xywh", said.unit)
        message = f"all {total} boxes would be right as xywh too, which is rare for xyxy: check bbox_format"
        hint = "look at the boxes below; set bbox_format on the lines or in the config if another reading is right"
    else:
        return []
    ordered = sorted(lines, key=lambda line: all(map(fits, corners_of(line))))
    examples = [
        Example(
            line.location,
            f"red as {found.name(said)}, blue as {found.name(better)}: {_few(line)}",
            line.image,
            tuple(corners_of(line)),
            tuple(corners_of(line, better)),
        )
        for line in ordered
        if line.numbers
    ]
    message = f"{message} ({found.line})"
    return finding("box-format", message, hint, examples, total=total, unit="boxes", count=wrong or total)


def _enough(lines: Sequence[Written]) -> bool:
    boxes = (four for line in lines for four in corners_of(line))
    return told_apart(boxes) >= ENOUGH_FOR_FORMAT


def _sizes(lines: Sequence[Written]) -> list[Finding]:
    examples = []
    for line in lines:
        if line.declared and line.size and line.declared != line.size:
            turned = "; the sides are swapped, as EXIF rotation does" if line.declared == line.size[::-1] else ""
            said, has = (f"{w:g} x {h:g}" for w, h in (line.declared, line.size))
            text = f"declared {said}, the image has {has} upright{turned}"
            examples.append(Example(line.location, text, line.image))
    return finding(
        "declared-size",
        "{n} lines declare another size than their image has",
        "check that each line belongs to its image, and to this size of it: boxes in pixels would be wrong",
        examples,
        total=len(lines),
        unit="records",
    )


def _few(line: Written) -> str:
    return ", ".join(str([round(v, 3) for v in four]) for four in line.numbers[:3])
