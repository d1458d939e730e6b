"""Detections matched to layouts, and per-image numerators and denominators of every metric.

COCO's average precision and recall are computed by pycocotools (cocodataset.org, "Detection Evaluation").
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdit_lora.boxes import box_iou
from mmdit_lora.evaluation.detectors import BoxMatch, Detection, Detector, match
from mmdit_lora.evaluation.detectors.base import words
from mmdit_lora.evaluation.intervals import Table
from mmdit_lora.layout import Layout

FIGURES = {
    "miou": "mean IoU of a box with the object that meets it, over boxes",
    "iou50": "share of boxes met at IoU >= 0.5",
    "color_acc": "share of boxes whose object has the colour asked for",
    "shape_acc": "share of boxes whose object has the shape asked for",
    "precision": "share of objects seen that meet a box at IoU >= 0.5",
    "count_acc": "share of images with as many objects as boxes",
    "count_error": "mean difference between the numbers of objects and of boxes",
    "relations": "share of pairs of boxes whose order along an axis the objects keep",
}
MATCHED = 0.5  # the IoU from which a box counts as detected
MIN_DISTANCE = 0.05  # of the image: centres that are nearer along an axis have no order along it


@dataclass(frozen=True)
class MatchedImage:
    """One image: the layout, the detections (if the detector is by label, of the layout's phrases), and how each box of the
    layout was matched, in order."""

    layout: Layout
    detections: tuple[Detection, ...]
    boxes: tuple[BoxMatch, ...]

    @property
    def miou(self) -> float:
        """Mean IoU over its boxes; NaN without any."""
        return float(np.mean([box.iou for box in self.boxes])) if self.boxes else float("nan")


def match_images(
    detector: Detector, detections: Sequence[Sequence[Detection]], layouts: Sequence[Layout]
) -> list[MatchedImage]:
    """Match each image's detections with its layout. If the detector is by label, detections that no phrase names are left
    out: photographs hold more than the layout says."""
    out = []
    for found, layout in zip(detections, layouts, strict=True):
        if detector.by_label:
            found = [d for d in found if any(detector.agrees(d.label, box.phrase) for box in layout.boxes)]
        boxes = match(found, layout, by_label=detector.by_label, attributes=detector.attributes, agree=detector.agrees)
        out.append(MatchedImage(layout, tuple(found), tuple(boxes)))
    return out


def metric_sums(images: Sequence[MatchedImage]) -> dict[str, Table]:
    """Metric -> (images, 2): what each image adds to the numerator and the denominator.

    A metric is the sum of the first over that of the second, for any selection of images. `color_acc` and `shape_acc` are
    absent if the detector reports none.
    """
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in FIGURES}
    for image in images:
        boxes, objects = image.boxes, len(image.detections)
        matched = sum(box.iou >= MATCHED for box in boxes)
        colors = [box.color for box in boxes if box.color is not None]
        shapes = [box.shape for box in boxes if box.shape is not None]
        rows["miou"].append((sum(box.iou for box in boxes), len(boxes)))
        rows["iou50"].append((matched, len(boxes)))
        rows["color_acc"].append((sum(colors), len(colors)))
        rows["shape_acc"].append((sum(shapes), len(shapes)))
        rows["precision"].append((matched, objects))
        rows["count_acc"].append((objects == len(boxes), 1))
        rows["count_error"].append((abs(objects - len(boxes)), 1))
        rows["relations"].append(kept_relations(image))
    tables = {name: np.array(values, dtype=np.float64).reshape(-1, 2) for name, values in rows.items()}
    return {name: table for name, table in tables.items() if table[:, 1].any()}


def box_metrics(boxes: Sequence[BoxMatch]) -> dict[str, float]:
    """The metrics of boxes alone, for groups of boxes over all images."""
    values: dict[str, Sequence[float]] = {
        "miou": [box.iou for box in boxes],
        "iou50": [box.iou >= MATCHED for box in boxes],
        "color_acc": [box.color for box in boxes if box.color is not None],
        "shape_acc": [box.shape for box in boxes if box.shape is not None],
    }
    return {name: float(np.mean(each)) for name, each in values.items() if each}


def kept_relations(image: MatchedImage) -> tuple[int, int]:
    """(kept, all) pairs of boxes, along each axis on which their centres lie at least `MIN_DISTANCE` apart, whose objects lie
    in the same order; a pair with an unmatched box is not kept. After VISOR (arXiv 2212.10015), without its captions."""
    centres = [_centre(box.xyxy) for box in image.layout.boxes]
    objects = [None if m.detection is None else _centre(image.detections[m.detection].xyxy) for m in image.boxes]
    kept = total = 0
    for second in range(len(centres)):
        for first in range(second):
            for axis in (0, 1):
                distance = centres[second][axis] - centres[first][axis]
                if abs(distance) >= MIN_DISTANCE:
                    a, b = objects[first], objects[second]
                    total += 1
                    kept += a is not None and b is not None and (b[axis] - a[axis]) * distance > 0
    return kept, total


def _centre(xyxy: Sequence[float]) -> tuple[float, float]:
    return (xyxy[0] + xyxy[2]) / 2, (xyxy[1] + xyxy[3]) / 2


# -- groups: where layouts are hard --------------------------------------------------------------------------------------

MAX_PHRASES = 50  # of a report's table by phrase
_BOXES = {"1-4": (1, 4), "5-10": (5, 10), "11+": (11, 10**9)}  # per image
_SIZES = {"under 2 %": 0.02, "2-10 %": 0.1, "over 10 %": 1.0}  # below this share of the image
_OVERLAPS = {"none": 0.0, "up to 0.2": 0.2, "over 0.2": 1.0}  # up to this IoU with another box of the layout

Place = tuple[int, int]  # image, box


def image_groups(layouts: Sequence[Layout]) -> dict[str, list[int]]:
    """ "1-4", ... -> the images with so many boxes; groups without any are absent."""
    groups = {
        name: [row for row, layout in enumerate(layouts) if low <= len(layout.boxes) <= high]
        for name, (low, high) in _BOXES.items()
    }
    return {name: rows for name, rows in groups.items() if rows}


def box_groups(layouts: Sequence[Layout]) -> dict[str, dict[str, list[Place]]]:
    """`by_size` and `by_overlap`: name -> the boxes in it; groups without any are absent. `by_phrase`: the `MAX_PHRASES` most
    frequent phrases, the most frequent first -> their boxes; blanks in a phrase do not count."""
    sizes: dict[str, list[Place]] = {name: [] for name in _SIZES}
    overlaps: dict[str, list[Place]] = {name: [] for name in _OVERLAPS}
    phrases: dict[str, list[Place]] = {}
    for row, layout in enumerate(layouts):
        iou = box_iou([box.xyxy for box in layout.boxes], [box.xyxy for box in layout.boxes])
        np.fill_diagonal(iou, 0)
        for index, box in enumerate(layout.boxes):
            size = next((name for name, below in _SIZES.items() if box.area < below), [*_SIZES][-1])
            sizes[size].append((row, index))
            overlaps[next(name for name, most in _OVERLAPS.items() if iou[index].max() <= most)].append((row, index))
            phrases.setdefault(" ".join(box.phrase.split()), []).append((row, index))
    frequent = sorted(phrases, key=lambda phrase: -len(phrases[phrase]))[:MAX_PHRASES]  # stable: then as in the layouts
    return {
        "by_size": {name: places for name, places in sizes.items() if places},
        "by_overlap": {name: places for name, places in overlaps.items() if places},
        "by_phrase": {phrase: phrases[phrase] for phrase in frequent},
    }


# -- average precision ---------------------------------------------------------------------------------------------------

COCO_METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
_CANVAS = 1000.0  # pixels of a side of the image, for COCO's metrics


def coco_metrics(
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    detections: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """COCO's metrics by name, without those that have no ground truth (e.g. `ap_small` without small objects).

    Args:
        images, categories: as in COCO's files. truth, detections: `image_id`, `category_id`, `bbox` (xywh in pixels); the
            truth also `area`, detections also `score`. Annotations are numbered here.
    """
    sets: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for entries in (truth, detections):
            sets.append(COCO())
            # pycocotools takes an id of 0 for none, and its own `loadRes` takes no empty list.
            numbered = [
                {"area": entry["bbox"][2] * entry["bbox"][3]} | dict(entry) | {"id": number, "iscrowd": 0}
                for number, entry in enumerate(entries, start=1)
            ]
            sets[-1].dataset = {"images": [*images], "categories": [*categories], "annotations": numbered}
            sets[-1].createIndex()
        run = COCOeval(*sets, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(value) for name, value in zip(COCO_METRICS, run.stats, strict=False) if value >= 0}


def average_precision(images: Sequence[MatchedImage], detector: Detector) -> dict[str, float]:
    """COCO's `ap`, `ap50` and `ar_100`, a category per phrase; mean over IoU 0.50 to 0.95 if none is named.

    A detection is of the category of the phrase that its label agrees with; of several, the first of its image. Without a
    phrase it does not count, since no box asked for it. The exact detector's scores are all 1: their order, and with it AP,
    is that of their size.
    """
    numbers: dict[tuple[str, ...], int] = {}
    for image in images:
        for box in image.layout.boxes:
            numbers.setdefault(words(box.phrase), len(numbers) + 1)
    truth, found = [], []
    for index, image in enumerate(images, start=1):
        boxes = image.layout.boxes
        truth += [_annotation(index, numbers[words(box.phrase)], box.xyxy) for box in boxes]
        for detection in image.detections:
            category, phrases = words(detection.label), [words(box.phrase) for box in boxes]
            if category not in phrases:
                agreeing = (
                    p for p, box in zip(phrases, boxes, strict=True) if detector.agrees(detection.label, box.phrase)
                )
                category = next(agreeing, category)
            if category in numbers:
                found.append(_annotation(index, numbers[category], detection.xyxy) | {"score": detection.score})
    rows = [{"id": index, "width": int(_CANVAS), "height": int(_CANVAS)} for index in range(1, len(images) + 1)]
    categories = [{"id": number, "name": " ".join(phrase)} for phrase, number in numbers.items()]
    metrics = coco_metrics(rows, categories, truth, found)
    return {name: metrics[name] for name in ("ap", "ap50", "ar_100") if name in metrics}


def _annotation(image: int, category: int, xyxy: Sequence[float]) -> dict[str, Any]:
    left, top, right, bottom = (float(value) * _CANVAS for value in xyxy)
    return {"image_id": image, "category_id": category, "bbox": [left, top, right - left, bottom - top]}
