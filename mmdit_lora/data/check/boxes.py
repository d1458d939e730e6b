"""Boxes: how they are written, tiny ones, and the same thing boxed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdit_lora.boxes import EDGE_SHARE, Evidence, Four, Reading, box_iou, distinct_as_xywh, relative
from mmdit_lora.data.check.findings import EXAMPLES_KEPT, SAME_IOU, TINY, Example, Findings
from mmdit_lora.data.records import Record, Written

# With fewer boxes, that all lie in the upper left quarter may be chance.
_ENOUGH_FOR_FORMAT = 12


def box_findings(found: Findings, records: Sequence[Record]) -> None:
    """Boxes that a model cannot draw, and those that repeat others."""
    for record in records:
        boxes = record.layout.boxes
        if not boxes:
            found.add("no-boxes", record, "no box")
        first: dict[tuple[str, Four], int] = {}
        for n, box in enumerate(boxes):
            if (side := min(box.width, box.height)) < TINY:
                text = f"objects.bbox[{n}] {box.phrase!r}: {box.width:.2%} wide, {box.height:.2%} high"
                found.add("tiny-boxes", record, text, [n], rank=side)
            i = first.setdefault((_plain(box.phrase), box.xyxy), n)
            if i != n:
                found.add("duplicate-boxes", record, f"objects.bbox[{n}] repeats [{i}], {box.phrase!r}", [i, n])
        _overlaps(found, record, list(first.values()))


def _overlaps(found: Findings, record: Record, chosen: list[int]) -> None:
    """Pairs of the `chosen` boxes of a record that are nearly the same, row by row: there may be millions."""
    boxes, numbers = record.layout.boxes, dict[str, int]()
    corners = np.array([boxes[i].xyxy for i in chosen]).reshape(-1, 4)
    phrases = np.array([numbers.setdefault(_plain(boxes[i].phrase), len(numbers)) for i in chosen])
    for row, i in enumerate(chosen[:-1]):
        ious = box_iou(corners[row : row + 1], corners[row + 1 :])[0]
        hits = np.flatnonzero(ious > SAME_IOU)
        same, one = phrases[row + 1 + hits] == phrases[row], boxes[i].phrase
        for name, columns in (("near-identical-boxes", hits[same]), ("same-box-other-phrase", hits[~same])):
            for n, column in enumerate(columns[:EXAMPLES_KEPT].tolist()):
                j = chosen[row + 1 + column]
                pair = f"[{i}] {one!r} and [{j}] {boxes[j].phrase!r}"
                if name == "near-identical-boxes":
                    pair = f"[{i}] and [{j}], both {one!r}"
                text = f"objects.bbox{pair}: IoU {ious[column]:.3f}"
                found.add(name, record, text, [i, j], count=0 if n else len(columns))


def corners_of(line: Written, reading: Reading | None = None) -> list[Four]:
    """Relative xyxy of a line's boxes, not clipped, as they are declared or under another reading; none where that needs a
    size that is not known."""
    reading = reading or line.reading
    if reading.unit == "pixel" and line.size is None:
        return []
    return [relative(four, reading, line.size) for four in line.numbers]


def fits(four: Four) -> bool:
    """Whether relative xyxy lies in the image (or is clipped to it), and is neither inverted nor empty."""
    left, top, right, bottom = four
    return min(four) >= -EDGE_SHARE and max(four) <= 1 + EDGE_SHARE and left < right and top < bottom


def reading_findings(found: Findings, lines: Sequence[Written], evidence: Evidence | None) -> None:
    """Whether another reading explains the boxes better than the declared one, and sizes that are not the images'.

    In xyxy the right and lower corners reach the far sides of the images; sizes added to left and top seldom pass 1.

    Args:
        evidence: the boxes of the lines under each reading (`set_evidence`); None where every line declares its own.
    """
    for line in lines:
        if line.declared and line.size and line.declared != line.size:
            turned = "; the sides are swapped, as EXIF rotation does" if line.declared == line.size[::-1] else ""
            stated, has = (f"{w:g} x {h:g}" for w, h in (line.declared, line.size))
            text = f"declared {stated}, the image has {has} upright{turned}"
            found.add("declared-size", Example(line.location, text, line.image), total=len(lines))
    if evidence is None:
        return
    declared, wrong, total = evidence.declared, evidence.wrong[evidence.declared], evidence.total
    if evidence.proposed:
        better = evidence.proposed[0]
        names = " or ".join(evidence.name(reading) for reading in evidence.proposed)
        what = (
            f"{wrong} of {total} boxes are wrong as {declared.order}, {evidence.wrong[better]} as {names}: "
            f"the boxes are probably {names}"
        )
        declare = evidence.hint
    elif (
        declared.order == "xyxy"
        and not wrong
        and not evidence.wrong[Reading("xywh", declared.unit)]
        and distinct_as_xywh(four for line in lines for four in corners_of(line)) >= _ENOUGH_FOR_FORMAT
    ):
        better = Reading("xywh", declared.unit)
        what = f"all {total} boxes would be right as xywh too, which is rare for xyxy: check bbox_format"
        declare = "set bbox_format on the lines or in the config if another reading is right"
    else:
        return
    names = f"red as {evidence.name(declared)}, blue as {evidence.name(better)}"
    values: dict[str, Any] = {"what": what, "declare": declare, "evidence": evidence.line, "total": total}
    found.add("box-format", None, count=wrong or total, **values)
    for line in lines:
        if line.numbers:
            own = corners_of(line)
            text = f"{names}: {', '.join(str([round(v, 3) for v in four]) for four in line.numbers[:3])}"
            shown = Example(line.location, text, line.image, tuple(own), tuple(corners_of(line, better)))
            found.add("box-format", shown, count=0, rank=all(map(fits, own)))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
