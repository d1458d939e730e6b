"""Is a detector or judge worth asking? It is tried on images whose truth is known, before it judges others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.common import Detection, Detector, known_layouts, same_number, words
from mmdit_lora.evaluation.detectors.judge import QUESTION, Judge, crops
from mmdit_lora.evaluation.detectors.matching import iou_table, match
from mmdit_lora.layout import Box, Layout

SHIFT = 0.1  # of a box's own sides
MET = 0.5  # the IoU from which a box counts as found

# What a detector needs to be trusted, and below what it is useless: see `self_test`.
TRUSTED = {"recall": 0.8, "precision": 0.5, "miou": 0.75, "label_agreement": 0.8, "margin": 0.3, "slope": 0.4}
USELESS = {"recall": 0.2, "label_agreement": 0.2, "margin": 0.1, "slope": 0.1}
JUDGE_TRUSTED = {"said_yes_to_true": 0.85, "said_no_to_false": 0.85, "answered": 0.95}
JUDGE_USELESS = {"balanced": 0.6}  # a coin has 0.5, and so has one who always says yes


@dataclass(frozen=True)
class Found:
    """What a detector finds of layouts.

    Args:
        recall: share of boxes that one detection meets at IoU >= 0.5, with a label that agrees where labels count.
        precision: share of detections that meet such a box; of those whose label agrees with some phrase of the layout
            where labels count: what else is in a photograph is nobody's fault. 0 without any.
        miou: mean IoU of the boxes met. 0 without any.
        label_agreement: of detections that meet a box by place alone at IoU >= 0.5, the share whose label agrees.
    """

    recall: float
    precision: float
    miou: float
    label_agreement: float
    boxes: int
    detections: int


@dataclass(frozen=True)
class SelfTest:
    """A detector on ground truth.

    Args:
        true: on the images' own layouts. shuffled: on those of other images.
        margin: true recall minus shuffled recall.
        slope: how much of the IoU is lost where the boxes are shifted by 10 % of their sides, as a share of what a perfect
            detector loses: 1 sees every shift, 0 none. Normal errors of 2, 5 and 8 % of the sides at every edge give 0.81,
            0.57 and 0.39 (and an mIoU of 0.94, 0.86 and 0.78).
        verdict: trusted, weak or useless. reasons: what is missing to trusted.
        unknown: boxes left out, as the detector cannot look for their phrases.
    """

    detector: str
    fingerprint: str
    images: int
    true: Found
    shuffled: Found
    margin: float
    slope: float
    verdict: str
    reasons: tuple[str, ...]
    unknown: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        found, other = self.true, self.shuffled
        line = (
            f"{self.detector}: {self.verdict} (recall {found.recall:.3f}, {other.recall:.3f} on shuffled layouts; precision "
            f"{found.precision:.3f}; mIoU of boxes met {found.miou:.3f}; labels right {found.label_agreement:.3f}; "
            f"slope {self.slope:.2f}; {found.boxes} boxes of {self.images} images)"
        )
        return line + "".join(f"\n  {reason}" for reason in self.reasons)


def self_test(detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> SelfTest:
    """Try a detector on ground-truth images.

    trusted: recall >= 0.8, precision >= 0.5, mIoU of the boxes met >= 0.75, labels right >= 0.8, recall at least 0.3
    above that on shuffled layouts, slope >= 0.4. useless: any of recall < 0.2, labels right < 0.2, that margin < 0.1,
    slope < 0.1. weak: what is between. (`TRUSTED`, `USELESS`.)

    Args:
        images, layouts: at least two images, of different layouts. Each layout is also put to the image before it,
            and open-vocabulary detectors look for its phrases there.

    Raises:
        ValueError: not as many images as layouts.
        InputError: fewer than two images, or no box whose phrase the detector knows.
    """
    same_number(images, layouts)
    if len(images) < 2:
        raise InputError(f"a self-test of {len(images)} images", hint="give at least two, to shuffle their layouts")
    known = known_layouts(detector, layouts)
    unknown = sum(len(layout.boxes) for layout in layouts) - sum(len(layout.boxes) for layout in known)
    if not any(layout.boxes for layout in known):
        raise InputError(f"{detector.name} knows none of the phrases", hint="give images of what it can look for")
    moved = [*known[1:], *known[:1]]
    seen = detector.detect(images, known)
    true, shuffled = _found(detector, seen, known), _found(detector, detector.detect(images, moved), moved)
    figures = {**asdict(true), "margin": true.recall - shuffled.recall, "slope": _slope(detector, seen, known)}
    verdict, reasons = _verdict(figures, TRUSTED, USELESS)
    return SelfTest(
        detector=detector.name,
        fingerprint=detector.fingerprint(),
        images=len(images),
        true=true,
        shuffled=shuffled,
        margin=figures["margin"],
        slope=figures["slope"],
        verdict=verdict,
        reasons=reasons,
        unknown=unknown,
    )


def _found(detector: Detector, seen: Sequence[Sequence[Detection]], layouts: Sequence[Layout]) -> Found:
    ious: list[float] = []
    labels: list[bool] = []
    boxes = candidates = 0
    for things, layout in zip(seen, layouts, strict=True):
        boxes += len(layout.boxes)
        if detector.by_label:
            candidates += sum(any(detector.agrees(thing.label, box.phrase) for box in layout.boxes) for thing in things)
        else:
            candidates += len(things)
        matches = match(things, layout, by_label=detector.by_label, agree=detector.agrees)
        ious += [box.iou for box in matches if box.iou >= MET]
        by_place = match(things, layout, by_label=False, attributes=False, agree=detector.agrees)
        labels += [box.label for box in by_place if box.iou >= MET]
    return Found(
        recall=len(ious) / boxes if boxes else 0.0,
        precision=len(ious) / candidates if candidates else 0.0,
        miou=_mean(ious),
        label_agreement=_mean(labels),
        boxes=boxes,
        detections=sum(len(things) for things in seen),
    )


def _slope(detector: Detector, seen: Sequence[Sequence[Detection]], layouts: Sequence[Layout]) -> float:
    """Loss of IoU by a shift over that of a perfect detector, over the boxes met where they are; 0 without any."""
    lost: list[float] = []
    perfect: list[float] = []
    for things, layout in zip(seen, layouts, strict=True):
        moved = shifted(layout, SHIFT)
        for box, there, match_here in zip(
            layout.boxes,
            moved.boxes,
            match(things, layout, by_label=detector.by_label, agree=detector.agrees),
            strict=True,
        ):
            if match_here.iou >= MET and match_here.detection is not None:
                thing = things[match_here.detection].xyxy
                lost.append(match_here.iou - float(iou_table([there.xyxy], [thing])[0, 0]))
                perfect.append(1 - float(iou_table([there.xyxy], [box.xyxy])[0, 0]))
    return float(np.sum(lost) / np.sum(perfect)) if np.sum(perfect) > 0 else 0.0


def shifted(layout: Layout, share: float) -> Layout:
    """A layout whose boxes are moved by `share` of their sides, each way to where the image has more room; what would
    leave it is cut off."""
    boxes = []
    for box in layout.boxes:
        left, top, right, bottom = box.xyxy
        dx = share * box.width * (1 if 1 - right >= left else -1)
        dy = share * box.height * (1 if 1 - bottom >= top else -1)
        x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in (left + dx, top + dy, right + dx, bottom + dy))
        boxes.append(Box((x0, y0, x1, y1), box.phrase))
    return replace(layout, boxes=tuple(boxes))


@dataclass(frozen=True)
class JudgeTest:
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        line = (
            f"{self.judge}: {self.verdict} (yes to {self.said_yes_to_true:.3f} of what is true, no to "
            f"{self.said_no_to_false:.3f} of what is not; {self.questions} questions, {self.answered:.3f} answered)"
        )
        return line + "".join(f"\n  {reason}" for reason in self.reasons)


def self_test_judge(
    judge: Judge,
    images: Sequence[Image.Image],
    layouts: Sequence[Layout],
    *,
    question: str = QUESTION,
    limit: int = 200,
) -> JudgeTest:
    """Ask a judge of the crop of each box whether it shows the box's phrase, and whether it shows another one.

    The other phrase is, of those of all layouts, the one with the fewest words in common with the box's own; of several, the
    one that comes next. trusted: both kinds >= 0.85 right, and >= 0.95 answered. useless: < 0.6 right on average, where a
    coin has 0.5. weak: what is between. (`JUDGE_TRUSTED`, `JUDGE_USELESS`.)

    Args:
        question: with `{phrase}` in it. limit: the most boxes asked about; they are taken evenly from all.

    Raises:
        ValueError: not as many images as layouts.
        InputError: no boxes, or only one phrase in all layouts; or the judge cannot be asked.
    """
    same_number(images, layouts)
    boxes = [
        (crop, box.phrase)
        for p, layout in zip(images, layouts, strict=True)
        for crop, box in zip(crops(p, layout), layout.boxes, strict=True)
    ]
    if len({words(phrase) for _, phrase in boxes}) < 2:
        raise InputError("a judge is tested with at least two different phrases", hint="give more images with boxes")
    if len(boxes) > limit:
        boxes = [boxes[index * len(boxes) // limit] for index in range(limit)]
    phrases = list(dict.fromkeys(box.phrase for layout in layouts for box in layout.boxes))
    asked = [[question.format(phrase=phrase), question.format(phrase=_unlike(phrase, phrases))] for _, phrase in boxes]
    answers = judge.ask([crop for crop, _ in boxes], asked)
    right = {
        "said_yes_to_true": _mean([yes is True for yes, _ in answers]),
        "said_no_to_false": _mean([no is False for _, no in answers]),
        "answered": _mean([answer is not None for pair in answers for answer in pair]),
    }
    balanced = (right["said_yes_to_true"] + right["said_no_to_false"]) / 2
    verdict, reasons = _verdict({**right, "balanced": balanced}, JUDGE_TRUSTED, JUDGE_USELESS)
    return JudgeTest(
        judge=judge.name,
        fingerprint=judge.fingerprint(),
        questions=2 * len(boxes),
        balanced=balanced,
        verdict=verdict,
        reasons=reasons,
        **right,
    )


def _unlike(phrase: str, phrases: Sequence[str]) -> str:
    own = set(words(phrase))
    start = phrases.index(phrase)
    others = [other for other in (*phrases[start + 1 :], *phrases[:start]) if set(words(other)) != own]
    share: Callable[[str], float] = lambda other: len(own & set(words(other))) / len(own | set(words(other)))  # noqa: E731
    return min(others, key=share)


def _verdict(
    figures: dict[str, float], trusted: dict[str, float], useless: dict[str, float]
) -> tuple[str, tuple[str, ...]]:
    low = [
        f"{key} is {figures[key]:.3f}, and below {least} it is useless"
        for key, least in useless.items()
        if figures[key] < least
    ]
    if low:
        return "useless", tuple(low)
    short = [
        f"{key} is {figures[key]:.3f}, and {least} is needed to be trusted"
        for key, least in trusted.items()
        if figures[key] < least
    ]
    return ("weak", tuple(short)) if short else ("trusted", ())


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
