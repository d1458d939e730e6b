"""Boxes: tiny ones, and the same thing boxed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mmdit_lora.data.check.findings import EXAMPLES_KEPT, Corners, Example, Finding, example, finding
from mmdit_lora.data.records import Record

TINY = 0.01  # of the picture's side
SAME_IOU = 0.95


def box_findings(records: Sequence[Record]) -> list[Finding]:
    """Warnings of boxes."""
    total = sum(len(record.layout.boxes) for record in records)
    return [
        *_tiny(records, total),
        *_twice(records, total),
        *finding(
            "no-boxes",
            "{n} records have no box: the layout stream learns nothing there",
            "box them, or leave them out",
            [example(record, "no box") for record in records if not record.layout.boxes],
            total=len(records),
            unit="records",
        ),
    ]


def _tiny(records: Sequence[Record], total: int) -> list[Finding]:
    found = []
    for record in records:
        for n, box in enumerate(record.layout.boxes):
            if min(box.width, box.height) < TINY:
                text = f"objects.bbox[{n}] {box.phrase!r}: {box.width:.2%} wide, {box.height:.2%} high"
                found.append((min(box.width, box.height), example(record, text, [n])))
    found.sort(key=lambda pair: pair[0])
    return finding(
        "tiny-boxes",
        "{n} of {total} boxes are less than 1 % of the picture wide or high",
        "remove them: they are smaller than what the model can draw",
        [shown for _, shown in found],
        total=total,
        unit="boxes",
    )


def _twice(records: Sequence[Record], total: int) -> list[Finding]:
    equal: list[Example] = []
    near: list[Example] = []
    other: list[Example] = []
    count: Counter[str] = Counter()
    for record in records:
        boxes = record.layout.boxes
        seen: dict[tuple[str, Corners], int] = {}
        distinct = []
        for j, box in enumerate(boxes):
            i = seen.setdefault((_plain(box.phrase), box.xyxy), j)
            if i == j:
                distinct.append(j)
                continue
            equal.append(example(record, f"objects.bbox[{j}] repeats [{i}], {boxes[i].phrase!r}", [i, j]))
        for i, j, overlap in _overlapping(distinct, np.array([box.xyxy for box in boxes]).reshape(-1, 4)):
            one, two = boxes[i], boxes[j]
            same = _plain(one.phrase) == _plain(two.phrase)
            kind, found = ("near", near) if same else ("other", other)
            count[kind] += 1
            # Of a picture with hundreds of boxes in one place, a few tell it all; all pairs would fill the memory.
            if count[kind] <= EXAMPLES_KEPT or not found or found[-1].where != record.where:
                what = f"and [{j}], both {one.phrase!r}" if same else f"{one.phrase!r} and [{j}] {two.phrase!r}"
                found.append(example(record, f"objects.bbox[{i}] {what}: IoU {overlap:.3f}", [i, j]))
    return [
        *finding(
            "duplicate-boxes",
            "{n} boxes repeat another one of their picture, phrase and all",
            "remove the second",
            equal,
            total=total,
            unit="boxes",
        ),
        *finding(
            "near-identical-boxes",
            f"{{n}} pairs of boxes with the same phrase overlap by more than {SAME_IOU:g} (IoU)",
            "keep one of each pair: a thing was probably boxed twice",
            near,
            total=total,
            unit="boxes",
            count=count["near"],
        ),
        *finding(
            "same-box-other-phrase",
            f"{{n}} pairs of boxes with different phrases overlap by more than {SAME_IOU:g} (IoU)",
            "keep the right phrase: one thing was probably named twice",
            other,
            total=total,
            unit="boxes",
            count=count["other"],
        ),
    ]


def _overlapping(chosen: Sequence[int], boxes: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(i, j, IoU) of the pairs i < j of `chosen` above `SAME_IOU`; boxes (N, 4) xyxy. Row by row: there may be thousands."""
    indices = np.array(chosen, dtype=int)
    boxes = boxes[indices]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(len(boxes) - 1):
        rest = boxes[i + 1 :]
        sides = np.minimum(boxes[i, 2:], rest[:, 2:]) - np.maximum(boxes[i, :2], rest[:, :2])
        shared = sides.clip(min=0).prod(axis=1)
        overlap = shared / (areas[i] + areas[i + 1 :] - shared)
        for j in np.flatnonzero(overlap > SAME_IOU):
            yield int(indices[i]), int(indices[i + 1 + j]), float(overlap[j])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
