"""One-to-one matching of detections with the boxes of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmdit_lora.boxes import box_iou
from mmdit_lora.data.shapes import phrase_attributes
from mmdit_lora.evaluation.detectors.base import Detection, agrees, words
from mmdit_lora.layout import Layout

_BONUS = 0.05  # added to the IoU of a pair of the same colour (or else label), in matching alone


@dataclass(frozen=True)
class BoxMatch:
    """The detection matched to one box of a layout.

    Args:
        iou: of the two; 0 without a detection.
        label: whether the detection's label agrees with the phrase. False without one.
        color, shape: whether they are those of the phrase; None if the detector reports none or the phrase names none.
        detection: its index in the list of detections; None: none.
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
    """Match boxes with detections, one to one, with the largest sum of IoUs (Hungarian method). In the layout's order.

    Args:
        by_label: only pairs whose label and phrase agree. Otherwise such a pair counts 0.05 IoU more, or a pair of the
            same colour if the detector reports colours; the IoU returned never includes that.
        attributes: whether the detector reports colours and shapes; None: if any detection has a colour.
        agree: of a label and a phrase (`Detector.agrees`). A detection whose label is a phrase of the layout agrees with
            no other phrase of it: "a dog" is not "a dog on a sofa" if the layout has both.
    """
    if attributes is None:
        attributes = any(found.color is not None for found in detections)
    known = [phrase_attributes(box.phrase) if attributes else None for box in layout.boxes]
    matches = [BoxMatch(0.0, False, *[None if asked is None else False] * 2) for asked in known]
    if not detections or not layout.boxes:
        return matches
    iou = box_iou([box.xyxy for box in layout.boxes], [found.xyxy for found in detections])
    phrases = [words(box.phrase) for box in layout.boxes]
    labels = [words(found.label) for found in detections]
    same = np.array(
        [
            [own == label if label in phrases else agree(d.label, box.phrase) for d, label in zip(detections, labels)]  # noqa: B905
            for own, box in zip(phrases, layout.boxes, strict=True)
        ]
    )
    if by_label:
        worth = np.where(same, iou, 0.0)
    else:
        color = np.array([[asked is not None and asked[0] == d.color for d in detections] for asked in known])
        has_color = np.array([asked is not None for asked in known])[:, None]
        worth = iou + _BONUS * (np.where(has_color, color, same) & (iou > 0))
    for row, column in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
        if worth[row, column] > 0:
            asked, found = known[row], detections[column]
            matches[row] = BoxMatch(
                iou=float(iou[row, column]),
                label=bool(same[row, column]),
                color=None if asked is None else asked[0] == found.color,
                shape=None if asked is None else asked[1] == found.shape,
                detection=int(column),
            )
    return matches
