"""Boxes: tiny ones, the same thing boxed twice, and those that the training crop cuts off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmdit_lora.data.check.findings import Example, Finding, example, finding
from mmdit_lora.data.records import Record

TINY = 0.01  # of the picture's side
SAME_IOU = 0.95
# Less of a box than this share, after a crop, shows no longer what the phrase says. Here and not in transforms.py, which would
# cost the check the seconds that PyTorch takes to import.
MIN_VISIBLE = 0.25


def box_findings(
    records: Sequence[Record], sizes: Mapping[Path, tuple[int, int]], *, resolution: int | None = None
) -> list[Finding]:
    """Warnings of boxes.

    Args:
        sizes: picture -> (width, height) in pixels, of those that could be read.
        resolution: side of the training pictures in pixels; None = the crop is judged at the picture's own size.
    """
    total = sum(len(record.layout.boxes) for record in records)
    return [
        *_tiny(records, total),
        *_twice(records, total),
        *_cropped(records, sizes, total, resolution),
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
    for record in records:
        boxes = record.layout.boxes
        for i, j, overlap in _overlapping(np.array([box.xyxy for box in boxes]).reshape(-1, 4)):
            one, two = boxes[i], boxes[j]
            if _plain(one.phrase) != _plain(two.phrase):
                text = f"objects.bbox[{i}] {one.phrase!r} and [{j}] {two.phrase!r}: IoU {overlap:.3f}"
                other.append(example(record, text, [i, j]))
            elif one.xyxy == two.xyxy:
                equal.append(example(record, f"objects.bbox[{j}] repeats [{i}], {one.phrase!r}", [i, j]))
            else:
                text = f"objects.bbox[{i}] and [{j}], both {one.phrase!r}: IoU {overlap:.3f}"
                near.append(example(record, text, [i, j]))
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
        ),
        *finding(
            "same-box-other-phrase",
            f"{{n}} pairs of boxes with different phrases overlap by more than {SAME_IOU:g} (IoU)",
            "keep the right phrase: one thing was probably named twice",
            other,
            total=total,
            unit="boxes",
        ),
    ]


def _overlapping(boxes: np.ndarray) -> list[tuple[int, int, float]]:
    """(i, j, IoU) of the pairs i < j above `SAME_IOU`; boxes (N, 4) xyxy. Row by row: N may be thousands."""
    pairs = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(len(boxes) - 1):
        rest = boxes[i + 1 :]
        sides = np.minimum(boxes[i, 2:], rest[:, 2:]) - np.maximum(boxes[i, :2], rest[:, :2])
        shared = sides.clip(min=0).prod(axis=1)
        overlap = shared / (areas[i] + areas[i + 1 :] - shared)
        pairs += [(i, i + 1 + int(j), float(overlap[j])) for j in np.flatnonzero(overlap > SAME_IOU)]
    return pairs


def _cropped(
    records: Sequence[Record], sizes: Mapping[Path, tuple[int, int]], total: int, resolution: int | None
) -> list[Finding]:
    found = []
    for record in records:
        width, height = sizes.get(record.image, (1, 1))
        (west, east), (north, south) = _kept((width, height), resolution or min(width, height))
        lost = []
        for n, box in enumerate(record.layout.boxes):
            left, top, right, bottom = box.xyxy
            across = min(right, east) - max(left, west)
            down = min(bottom, south) - max(top, north)
            if max(across, 0) * max(down, 0) < (MIN_VISIBLE - 1e-9) * box.area:  # exactly a quarter is kept
                lost.append(n)
        if lost:
            what = f"{len(lost)} of {len(record.layout.boxes)} boxes, picture of {width} x {height} pixels"
            found.append((len(lost), example(record, what, lost)))
    found.sort(key=lambda pair: -pair[0])
    count = sum(lost_here for lost_here, _ in found)
    return finding(
        "cropped-boxes",
        f"{{n}} of {{total}} boxes, in {len(found)} records, are lost to the square center crop",
        f"they are dropped with their phrase where less than {MIN_VISIBLE:.0%} is left; captions still name them. "
        "Cut the pictures square around what matters, or train with crop: random",
        [shown for _, shown in found],
        total=total,
        unit="boxes",
        count=count,
    )


def _kept(size: tuple[int, int], side: int) -> list[tuple[float, float]]:
    """What the center crop keeps of (width, height), each as a range in [0, 1]; whole pixels, as in transforms.py."""
    scale = side / min(size)
    resized = [max(side, round(length * scale)) for length in size]
    return [((length - side) // 2 / length, ((length - side) // 2 + side) / length) for length in resized]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
