"""Self-tests: a detector or judge is tried on images whose truth is known, before it measures others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmdit_lora.boxes import box_iou
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.base import Detection, Detector, known_layouts, require_same_number, words
from mmdit_lora.evaluation.detectors.judge import Judge, crops
from mmdit_lora.evaluation.detectors.matching import match
from mmdit_lora.layout import Box, Layout

SHIFT = 0.1  # of a box's sides
MATCHED = 0.5  # the IoU from which a box counts as detected
QUESTION = "Does this image show {phrase}? Answer with yes or no only."

# Lower bounds of the verdicts: see `self_test`.
TRUSTED = {"recall": 0.8, "precision": 0.5, "miou": 0.75, "label_agreement": 0.8, "margin": 0.3, "slope": 0.4}
USELESS = {"recall": 0.2, "label_agreement": 0.2, "margin": 0.1, "slope": 0.1}
JUDGE_TRUSTED = {"said_yes_to_true": 0.85, "said_no_to_false": 0.85, "answered": 0.95}
JUDGE_USELESS = {"balanced": 0.6}  # chance, and a judge that always says yes, have 0.5


@dataclass(frozen=True)
class DetectionMetrics:
    """A detector on layouts.

    Args:
        recall: share of boxes that one detection matches at IoU >= 0.5, with a label that agrees if the detector is by
            label.
        precision: share of detections that match such a box; if the detector is by label, of those whose label agrees
            with some phrase of the layout, since photographs hold more than the layout says. 0 without any.
        miou: mean IoU of the matched boxes. 0 without any.
        label_agreement: of detections that match a box by place alone at IoU >= 0.5, the share whose label agrees.
    """

    recall: float
    precision: float
    miou: float
    label_agreement: float
    boxes: int
    detections: int


class _Result:
    """What the results of both tests share."""

    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def _with_reasons(self, line: str) -> str:
        return "\n  ".join([line, *self.reasons])


@dataclass(frozen=True)
class SelfTest(_Result):
    """A detector on ground truth.

    Args:
        true: on the images' own layouts. shuffled: on those of other images.
        margin: true recall minus shuffled recall.
        slope: the loss of IoU when boxes are shifted by 10 % of their sides, relative to that of a perfect detector: 1
            notices every shift, 0 none. Normal errors of 2, 5 and 8 % of the sides at every edge give 0.81, 0.57 and 0.39
            (and an mIoU of 0.94, 0.86 and 0.78).
        verdict: trusted, weak or useless. reasons: what is missing to trusted.
        unknown: boxes left out because the detector cannot look for their phrases.
    """

    detector: str
    fingerprint: str
    images: int
    true: DetectionMetrics
    shuffled: DetectionMetrics
    margin: float
    slope: float
    verdict: str
    reasons: tuple[str, ...]
    unknown: int

    def __str__(self) -> str:
        true = self.true
        return self._with_reasons(
            f"{self.detector}: {self.verdict} (recall {true.recall:.3f}, {self.shuffled.recall:.3f} on shuffled layouts; "
            f"precision {true.precision:.3f}; mIoU of boxes met {true.miou:.3f}; labels right {true.label_agreement:.3f}; "
            f"slope {self.slope:.2f}; {true.boxes} boxes of {self.images} images)"
        )


def self_test(detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> SelfTest:
    """Try a detector on ground-truth images.

    trusted: recall >= 0.8, precision >= 0.5, mIoU of the matched boxes >= 0.75, label agreement >= 0.8, recall at least
    0.3 above that on shuffled layouts, slope >= 0.4. useless: recall < 0.2, label agreement < 0.2, that margin < 0.1, or
    slope < 0.1. weak: in between. (`TRUSTED`, `USELESS`.)

    Args:
        images, layouts: at least two images, of different layouts. Each layout is also tried on the image before it, where
            open-vocabulary detectors look for its phrases.

    Raises:
        ValueError: the numbers of images and layouts differ.
        InputError: fewer than two images, or no box whose phrase the detector knows.
    """
    require_same_number(images, layouts)
    if len(images) < 2:
        raise InputError(f"a self-test of {len(images)} images", hint="give at least two, to shuffle their layouts")
    known = known_layouts(detector, layouts)
    boxes, known_boxes = (sum(len(layout.boxes) for layout in each) for each in (layouts, known))
    if not known_boxes:
        raise InputError(f"{detector.name} knows none of the phrases", hint="give images of what it can look for")
    moved = [*known[1:], *known[:1]]
    detections = detector.detect(images, known)
    true = _metrics(detector, detections, known)
    shuffled = _metrics(detector, detector.detect(images, moved), moved)
    margin, slope = true.recall - shuffled.recall, _slope(detector, detections, known)
    verdict, reasons = _verdict({**asdict(true), "margin": margin, "slope": slope}, TRUSTED, USELESS)
    name, fingerprint, unknown = detector.name, detector.fingerprint(), boxes - known_boxes
    return SelfTest(name, fingerprint, len(images), true, shuffled, margin, slope, verdict, reasons, unknown)


def _metrics(
    detector: Detector, detections: Sequence[Sequence[Detection]], layouts: Sequence[Layout]
) -> DetectionMetrics:
    ious: list[float] = []
    labels: list[bool] = []
    candidates = 0
    for found, layout in zip(detections, layouts, strict=True):
        candidates += sum(
            not detector.by_label or any(detector.agrees(d.label, box.phrase) for box in layout.boxes) for d in found
        )
        matches = match(found, layout, by_label=detector.by_label, agree=detector.agrees)
        ious += [box.iou for box in matches if box.iou >= MATCHED]
        by_place = match(found, layout, by_label=False, attributes=False, agree=detector.agrees)
        labels += [box.label for box in by_place if box.iou >= MATCHED]
    boxes = sum(len(layout.boxes) for layout in layouts)
    return DetectionMetrics(
        recall=len(ious) / boxes if boxes else 0.0,
        precision=len(ious) / candidates if candidates else 0.0,
        miou=_mean(ious),
        label_agreement=_mean(labels),
        boxes=boxes,
        detections=sum(map(len, detections)),
    )


def _slope(detector: Detector, detections: Sequence[Sequence[Detection]], layouts: Sequence[Layout]) -> float:
    """Loss of IoU by a shift over that of a perfect detector, over the matched boxes; 0 without any."""
    lost: list[float] = []
    perfect: list[float] = []
    for found, layout in zip(detections, layouts, strict=True):
        matches = match(found, layout, by_label=detector.by_label, agree=detector.agrees)
        for box, moved, own in zip(layout.boxes, shifted(layout, SHIFT).boxes, matches, strict=True):
            if own.iou >= MATCHED and own.detection is not None:
                there, unmoved = box_iou([moved.xyxy], [found[own.detection].xyxy, box.xyxy])[0].tolist()
                lost.append(own.iou - there)
                perfect.append(1 - unmoved)
    return float(np.sum(lost) / np.sum(perfect)) if np.sum(perfect) > 0 else 0.0


def shifted(layout: Layout, share: float) -> Layout:
    """A layout whose boxes are moved by `share` of their sides, to where the image has more room, and clipped to it."""
    boxes = []
    for box in layout.boxes:
        left, top, right, bottom = box.xyxy
        dx = share * box.width * (1 if 1 - right >= left else -1)
        dy = share * box.height * (1 if 1 - bottom >= top else -1)
        x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in (left + dx, top + dy, right + dx, bottom + dy))
        boxes.append(Box((x0, y0, x1, y1), box.phrase))
    return replace(layout, boxes=tuple(boxes))


@dataclass(frozen=True)
class JudgeTest(_Result):
    """A judge on true and false questions about ground truth.

    Args:
        said_yes_to_true, said_no_to_false: shares of right answers; no answer is a wrong one.
        balanced: their mean. answered: share of answers that are yes or no.
        verdict, reasons: as in `SelfTest`.
    """

    judge: str
    fingerprint: str
    questions: int
    said_yes_to_true: float
    said_no_to_false: float
    balanced: float
    answered: float
    verdict: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return self._with_reasons(
            f"{self.judge}: {self.verdict} (yes to {self.said_yes_to_true:.3f} of what is true, no to "
            f"{self.said_no_to_false:.3f} of what is not; {self.questions} questions, {self.answered:.3f} answered)"
        )


def self_test_judge(
    judge: Judge,
    images: Sequence[Image.Image],
    layouts: Sequence[Layout],
    *,
    question: str = QUESTION,
    limit: int = 200,
) -> JudgeTest:
    """Ask a judge of the crop of each box whether it shows the box's phrase, and whether it shows another one.

    The other phrase is the one of all layouts with the fewest words in common with the box's own; of several, the next in
    order. trusted: both kinds >= 0.85 right, and >= 0.95 answered. useless: < 0.6 right on average, where chance has 0.5.
    weak: in between. (`JUDGE_TRUSTED`, `JUDGE_USELESS`.)

    Args:
        question: with `{phrase}` in it. limit: the most boxes asked about, spread evenly over all.

    Raises:
        ValueError: the numbers of images and layouts differ.
        InputError: no boxes, or only one phrase in all layouts; or the judge cannot be asked.
    """
    require_same_number(images, layouts)
    boxes = [
        (crop, box.phrase)
        for image, layout in zip(images, layouts, strict=True)
        for crop, box in zip(crops(image, layout), layout.boxes, strict=True)
    ]
    if len({words(phrase) for _, phrase in boxes}) < 2:
        raise InputError("a judge is tested with at least two different phrases", hint="give more images with boxes")
    phrases = list(dict.fromkeys(phrase for _, phrase in boxes))
    if len(boxes) > limit:
        boxes = [boxes[index * len(boxes) // limit] for index in range(limit)]
    questions = [[question.format(phrase=text) for text in (own, _unlike(own, phrases))] for _, own in boxes]
    answers = judge.ask([crop for crop, _ in boxes], questions)
    right = {
        "said_yes_to_true": _mean([yes is True for yes, _ in answers]),
        "said_no_to_false": _mean([no is False for _, no in answers]),
        "answered": _mean([answer is not None for pair in answers for answer in pair]),
    }
    right["balanced"] = (right["said_yes_to_true"] + right["said_no_to_false"]) / 2
    verdict, reasons = _verdict(right, JUDGE_TRUSTED, JUDGE_USELESS)
    return JudgeTest(
        judge.name, judge.fingerprint(), questions=2 * len(boxes), verdict=verdict, reasons=reasons, **right
    )


def _unlike(phrase: str, phrases: Sequence[str]) -> str:
    own, start = set(words(phrase)), phrases.index(phrase)

    def overlap(other: str) -> float:
        return len(own & set(words(other))) / len(own | set(words(other)))

    others = (*phrases[start + 1 :], *phrases[:start])
    return min((other for other in others if set(words(other)) != own), key=overlap)


def _verdict(
    metrics: Mapping[str, float], trusted: Mapping[str, float], useless: Mapping[str, float]
) -> tuple[str, tuple[str, ...]]:
    for verdict, bounds, consequence in (
        ("useless", useless, "and below {} it is useless"),
        ("weak", trusted, "and {} is needed to be trusted"),
    ):
        low = {key: least for key, least in bounds.items() if metrics[key] < least}
        if low:
            return verdict, tuple(f"{k} is {metrics[k]:.3f}, {consequence.format(v)}" for k, v in low.items())
    return "trusted", ()


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
