"""Detections of any detector to the boxes of a layout, one to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from mmdit_lora.data.shapes import phrase_attributes
from mmdit_lora.evaluation.detectors.common import Detection, agrees, words
from mmdit_lora.layout import Layout

_BONUS = 0.05  # what the same colour, or else the same label, is worth in matching, in IoU; as in the exact reader


@dataclass(frozen=True)
class BoxMatch:
    """How one requested box was met.

    Args:
        iou: with the detection matched to it; 0: none is.
        label: whether that detection's label agrees with the phrase. False without one.
        color, shape: whether they are those of the phrase; None where the detector tells none or the phrase names none.
        detection: its place in the list of detections; None: none.
    """

    iou: float
    label: bool
    color: bool | None = None
    shape: bool | None = None
    detection: int | None = None


def match(
    detections: Sequence[Detection],
    layout: Layout,
    *,
    by_label: bool,
    attributes: bool | None = None,
    agree: Callable[[str, str], bool] = agrees,
) -> list[BoxMatch]:
    """Boxes to detections, one to one, so that the sum of IoUs is largest (Hungarian method). In the layout's order.

    Args:
        by_label: only pairs whose label and phrase agree. Otherwise such a pair counts 0.05 IoU more, or a pair of the
            same colour where the detector tells colours; the IoU reported never holds that.
        attributes: whether this detector tells colours and shapes; None: if any of the detections has a colour.
        agree: of a label and a phrase (`Detector.agrees`). A detection whose label *is* a phrase of the layout agrees with
            no other phrase of it: "a dog" is not "a dog on a sofa" where both are asked for.
    """
    if attributes is None:
        attributes = any(thing.color is not None for thing in detections)
    asked = [phrase_attributes(box.phrase) if attributes else None for box in layout.boxes]
    unknown = [None if known is None else False for known in asked]
    matches = [BoxMatch(0.0, False, known, known) for known in unknown]
    if not detections or not layout.boxes:
        return matches
    iou = iou_table([box.xyxy for box in layout.boxes], [thing.xyxy for thing in detections])
    same = _agreeing(detections, layout, agree)
    if by_label:
        worth = np.where(same, iou, 0.0)
    else:
        color = np.array([[known is not None and known[0] == d.color for d in detections] for known in asked])
        told = np.array([known is not None for known in asked])[:, None]
        worth = iou + _BONUS * (np.where(told, color, same) & (iou > 0))
    for row, column in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
        if worth[row, column] > 0:
            known, thing = asked[row], detections[column]
            matches[row] = BoxMatch(
                iou=float(iou[row, column]),
                label=bool(same[row, column]),
                color=None if known is None else known[0] == thing.color,
                shape=None if known is None else known[1] == thing.shape,
                detection=int(column),
            )
    return matches


def iou_table(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """IoU of every box of `a` with every box of `b`, (len(a), len(b)); 0 where both are empty."""
    first, second = np.array(a, dtype=np.float64).reshape(-1, 1, 4), np.array(b, dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    both = np.clip(sides, 0, None).prod(-1)
    total = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - both
    return np.divide(both, total, out=np.zeros_like(both), where=total > 0)


def _agreeing(detections: Sequence[Detection], layout: Layout, agree: Callable[[str, str], bool]) -> NDArray[np.bool_]:
    """(boxes, detections): whether label and phrase agree."""
    phrases = [words(box.phrase) for box in layout.boxes]
    table = np.zeros((len(phrases), len(detections)), dtype=bool)
    for column, thing in enumerate(detections):
        label = words(thing.label)
        named = label in phrases
        for row, box in enumerate(layout.boxes):
            table[row, column] = phrases[row] == label if named else agree(thing.label, box.phrase)
    return table
