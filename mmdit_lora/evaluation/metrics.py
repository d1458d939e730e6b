"""Detections matched to a layout, and per-image numerators and denominators of every metric.

COCO's average precision and recall are computed by pycocotools (cocodataset.org, "Detection Evaluation").
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdit_lora.evaluation.detectors import BoxMatch, Detection, Detector, match
from mmdit_lora.evaluation.detectors.common import words
from mmdit_lora.layout import Layout

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")


def coco_figures(
    images: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    truth: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """COCO's figures by name, without those that no thing decides (e.g. `ap_small` without small things).

    Args:
        images, categories: as in COCO's files. truth, found: `image_id`, `category_id`, `bbox` (xywh in pixels), `area`; the
            found also `score`. Numbers of annotations are given here.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for entries in (truth, found):
            sides.append(COCO())
            # pycocotools takes an id of 0 for none, and its own `loadRes` takes no empty list.
            numbered = [entry | {"id": n, "iscrowd": 0} for n, entry in enumerate(entries, start=1)]
            sides[-1].dataset = {"images": list(images), "categories": list(categories), "annotations": numbered}
            sides[-1].createIndex()
        run = COCOeval(*sides, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(value) for name, value in zip(NAMES, run.stats, strict=False) if value >= 0}


Table = NDArray[np.float64]

MET = 0.5  # a box counts as met from this IoU on
APART = 0.05  # of the image: centres that are nearer along an axis have no order along it
_CANVAS = 1000.0  # pixels of the image that COCO's figures see


@dataclass(frozen=True)
class Judged:
    """One image.

    Args:
        layout: what was asked for. seen: what a detector found, of those labels that were asked for where labels count.
        boxes: how each box was met, in the layout's order.
    """

    layout: Layout
    seen: tuple[Detection, ...]
    boxes: tuple[BoxMatch, ...]

    @property
    def miou(self) -> float:
        """Mean IoU over its boxes; NaN without any."""
        return float(np.mean([box.iou for box in self.boxes])) if self.boxes else float("nan")


def judged(detector: Detector, seen: Sequence[Sequence[Detection]], layouts: Sequence[Layout]) -> list[Judged]:
    """What a detector has seen, matched with layouts. What no phrase names is nobody's fault in a photograph: it is left out
    where the detector's labels count."""
    out = []
    for things, layout in zip(seen, layouts, strict=True):
        if detector.by_label:
            things = [t for t in things if any(detector.agrees(t.label, box.phrase) for box in layout.boxes)]
        boxes = match(things, layout, by_label=detector.by_label, attributes=detector.attributes, agree=detector.agrees)
        out.append(Judged(layout, tuple(things), tuple(boxes)))
    return out


# -- sums ----------------------------------------------------------------------------------------------------------------

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


def sums(images: Sequence[Judged]) -> dict[str, Table]:
    """Name -> (images, 2): what each image adds to a figure's numerator and denominator.

    A figure is the sum of the first over that of the second, for any selection of images. `color_acc` and `shape_acc` are
    absent where the detector tells none.
    """
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in FIGURES}
    for image in images:
        boxes, seen = image.boxes, len(image.seen)
        met = sum(box.iou >= MET for box in boxes)
        for name, told in (
            ("color_acc", [b.color for b in boxes if b.color is not None]),
            ("shape_acc", [b.shape for b in boxes if b.shape is not None]),
        ):
            out[name].append((sum(told), len(told)))
        out["miou"].append((sum(box.iou for box in boxes), len(boxes)))
        out["iou50"].append((met, len(boxes)))
        out["precision"].append((met, seen))
        out["count_acc"].append((float(seen == len(boxes)), 1))
        out["count_error"].append((abs(seen - len(boxes)), 1))
        out["relations"].append(kept_relations(image))
    tables = {name: np.array(rows, dtype=np.float64).reshape(-1, 2) for name, rows in out.items()}
    return {name: table for name, table in tables.items() if table[:, 1].any()}


def box_sums(boxes: Sequence[BoxMatch]) -> dict[str, float]:
    """The figures of boxes alone, for groups of boxes over all images."""
    found: dict[str, Sequence[float]] = {
        "miou": [box.iou for box in boxes],
        "iou50": [box.iou >= MET for box in boxes],
        "color_acc": [box.color for box in boxes if box.color is not None],
        "shape_acc": [box.shape for box in boxes if box.shape is not None],
    }
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def kept_relations(image: Judged) -> tuple[int, int]:
    """(kept, asked): pairs of boxes, along each axis on which their centres lie at least `APART` apart, whose objects lie in
    the same order; a pair with a box that nothing meets is not kept. After VISOR (arXiv 2212.10015), without its captions."""
    kept = asked = 0
    centres = [_centre(box.xyxy) for box in image.layout.boxes]
    places = [None if m.detection is None else _centre(image.seen[m.detection].xyxy) for m in image.boxes]
    for second in range(len(centres)):
        for first in range(second):
            for axis in (0, 1):
                wanted = centres[second][axis] - centres[first][axis]
                if abs(wanted) < APART:
                    continue
                asked += 1
                a, b = places[first], places[second]
                kept += a is not None and b is not None and (b[axis] - a[axis]) * wanted > 0
    return kept, asked


def _centre(xyxy: Sequence[float]) -> tuple[float, float]:
    return (xyxy[0] + xyxy[2]) / 2, (xyxy[1] + xyxy[3]) / 2


# -- average precision ---------------------------------------------------------------------------------------------------


def average_precision(images: Sequence[Judged], detector: Detector) -> dict[str, float]:
    """COCO's `ap`, `ap50` and `ar_100`, a category a phrase; mean over IoU 0.50 to 0.95 where none is named.

    A detection is of the category of the phrase that its label agrees with; of several, the first of its image. Without
    a phrase it counts for nothing, since no box asked for it. The exact reader's detections all score 1: their order, and
    with it AP, is that of their size.
    """
    numbers: dict[tuple[str, ...], int] = {}
    image_rows, truth, found = [], [], []
    for index, image in enumerate(images, start=1):
        image_rows.append({"id": index, "width": int(_CANVAS), "height": int(_CANVAS)})
        for box in image.layout.boxes:
            number = numbers.setdefault(words(box.phrase), len(numbers) + 1)
            truth.append(_annotation(index, number, box.xyxy))
        for thing in image.seen:
            own = words(thing.label)
            agreeing = (words(b.phrase) for b in image.layout.boxes if detector.agrees(thing.label, b.phrase))
            category = own if own in numbers else next(agreeing, own)
            found.append((index, category, thing))
    categories = [{"id": number, "name": " ".join(phrase)} for phrase, number in numbers.items()]
    entries = [
        _annotation(index, numbers[category], thing.xyxy) | {"score": thing.score}
        for index, category, thing in found
        if category in numbers
    ]
    figures = coco_figures(image_rows, categories, truth, entries)
    return {name: figures[name] for name in ("ap", "ap50", "ar_100") if name in figures}


def _annotation(image: int, category: int, xyxy: Sequence[float]) -> dict[str, object]:
    left, top, right, bottom = (float(value) * _CANVAS for value in xyxy)
    bbox = [left, top, right - left, bottom - top]
    return {"image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3]}
