"""Boxes: tiny ones, and the same thing boxed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmdit_lora.data.check.findings import EXAMPLES_KEPT, Corners, Example, Finding, example, finding
from mmdit_lora.data.records import Record
from mmdit_lora.layout import Box

TINY = 0.01  # of the image's side
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
        "{n} of {total} boxes are less than 1 % of the image wide or high",
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

    def note(found: list[Example], record: Record, text: str, boxes: list[int]) -> None:
        """Of an image with hundreds of boxes in one place a few tell it all; all pairs would fill the memory."""
        if len(found) < EXAMPLES_KEPT or found[-1].location != record.location:
            found.append(example(record, text, boxes))

    for record in records:
        boxes = record.layout.boxes
        first: dict[tuple[str, Corners], int] = {}
        for j, box in enumerate(boxes):
            i = first.setdefault((_plain(box.phrase), box.xyxy), j)
            if i != j:
                count["equal"] += 1
                note(equal, record, f"objects.bbox[{j}] repeats [{i}], {boxes[i].phrase!r}", [i, j])
        distinct = list(first.values())
        for i, same, different in _overlapping(distinct, boxes):
            one = boxes[i]
            count["near"] += same.number
            count["other"] += different.number
            for j, overlap in same.first:
                text = f"objects.bbox[{i}] and [{j}], both {one.phrase!r}: IoU {overlap:.3f}"
                note(near, record, text, [i, j])
            for j, overlap in different.first:
                text = f"objects.bbox[{i}] {one.phrase!r} and [{j}] {boxes[j].phrase!r}: IoU {overlap:.3f}"
                note(other, record, text, [i, j])
    return [
        *finding(
            "duplicate-boxes",
            "{n} boxes repeat another one of their image, phrase and all",
            "remove the second",
            equal,
            total=total,
            unit="boxes",
            count=count["equal"],
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


class Hits(NamedTuple):
    """How many boxes overlap one, and the first few of them: (index, IoU)."""

    number: int
    first: list[tuple[int, float]]


def _overlapping(chosen: Sequence[int], boxes: Sequence[Box]) -> Iterator[tuple[int, Hits, Hits]]:
    """(i, those of the same phrase, those of another) of the boxes behind i in `chosen` that overlap it by more than `SAME_IOU`.

    Row by row: there may be thousands.
    """
    indices = np.array(chosen, dtype=int)
    corners = np.array([boxes[i].xyxy for i in chosen]).reshape(-1, 4)
    numbers: dict[str, int] = {}
    phrases = np.array([numbers.setdefault(_plain(boxes[i].phrase), len(numbers)) for i in chosen], dtype=int)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    for i in range(len(corners) - 1):
        rest = corners[i + 1 :]
        sides = np.minimum(corners[i, 2:], rest[:, 2:]) - np.maximum(corners[i, :2], rest[:, :2])
        shared = sides.clip(min=0).prod(axis=1)
        overlap = shared / (areas[i] + areas[i + 1 :] - shared)
        hits = np.flatnonzero(overlap > SAME_IOU)
        if len(hits):
            same = phrases[i + 1 + hits] == phrases[i]
            behind = indices[i + 1 :]
            yield int(indices[i]), _hits(behind, overlap, hits[same]), _hits(behind, overlap, hits[~same])


def _hits(indices: np.ndarray, overlap: np.ndarray, some: np.ndarray) -> Hits:
    few = some[:EXAMPLES_KEPT]
    return Hits(len(some), list(zip(indices[few].tolist(), overlap[few].tolist(), strict=True)))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
