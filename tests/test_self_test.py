"""Matching on hand-made cases, and the self-test: it must trust a good detector and see through bad ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmdit_lora.boxes import box_iou
from mmdit_lora.data.shapes import DOMAINS, make_scene
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection, Detector, SelfTest, match, open_detector, self_test
from mmdit_lora.evaluation.detectors.self_testing import TRUSTED, USELESS, shifted
from mmdit_lora.evaluation.detectors.shapes import per_image
from mmdit_lora.layout import Box, Layout


@cache
def scenes(domain: str = "mixed", count: int = 24) -> tuple[list[Image.Image], list[Layout]]:
    images, layouts = zip(*(make_scene(DOMAINS[domain], 5, index) for index in range(count)), strict=True)
    return list(images), list(layouts)


def layout(*boxes: tuple[tuple[float, float, float, float], str]) -> Layout:
    return Layout("", [Box(xyxy, phrase) for xyxy, phrase in boxes])


A, B = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)


def test_iou_by_hand() -> None:
    table = box_iou([A, (0.2, 0.2, 0.6, 0.6)], [A, B, (0.1, 0.1, 0.1, 0.1)])
    assert table == pytest.approx(np.array([[1, 0, 0], [1 / 7, 1 / 31, 0]]))


def test_labels_decide_where_they_are_to() -> None:
    wanted = layout((A, "a dog"), (B, "a cat"))
    swapped = [Detection(A, "cat", 0.9), Detection(B, "dog", 0.8)]
    assert [(m.iou, m.label, m.detection) for m in match(swapped, wanted, by_label=True)] == [(0, False, None)] * 2
    by_place = match(swapped, wanted, by_label=False)
    assert [(m.iou, m.label, m.detection) for m in by_place] == [(1, False, 0), (1, False, 1)]
    assert {m.color for m in by_place} == {m.shape for m in by_place} == {None}
    right = [replace(swapped[0], label="dog"), replace(swapped[1], label="cat")]
    assert [(m.iou, m.label) for m in match(right, wanted, by_label=True)] == [(1, True)] * 2


def test_matching_is_one_to_one_and_best_in_sum() -> None:
    wanted = layout(((0.0, 0.0, 0.4, 1.0), "a dog"), ((0.1, 0.0, 0.5, 1.0), "a dog"))
    # The first box would rather have the middle one, but then nothing is left for the second.
    seen = [Detection((0.05, 0.0, 0.45, 1.0), "dog"), Detection((0.0, 0.0, 0.3, 1.0), "dog")]
    found = match(seen, wanted, by_label=True)
    assert [m.detection for m in found] == [1, 0]
    assert [m.iou for m in found] == pytest.approx([0.75, 7 / 9])
    assert [m.detection for m in match(seen[:1], wanted, by_label=True)].count(None) == 1


def test_a_label_that_is_a_phrase_stands_for_no_other() -> None:
    wanted = layout((A, "a dog on a sofa"), (B, "a dog"))
    (first, second) = match([Detection(A, "a dog")], wanted, by_label=True)
    assert (first.detection, second.detection) == (None, None)
    (alone,) = match([Detection(A, "a dog")], layout((A, "a dog on a sofa")), by_label=True)
    assert alone.iou == 1
    (own,) = match([Detection(A, "dog")], layout((A, "a dog")), by_label=True, agree=lambda *_: False)
    assert own.iou == 1


@pytest.mark.parametrize("domain", ["mixed", "dense", "page"])
def test_figures_of_the_exact_reader_are_its_own(domain: str) -> None:
    images, layouts = scenes(domain)
    worn = [image.filter(ImageFilter.GaussianBlur(1.2)) for image in images]
    detector = open_detector("shapes")
    for shown, asked in ((worn, layouts), (worn, layouts[1:] + layouts[:1])):
        mine = [
            [(m.iou, m.color, m.shape) for m in match(things, one, by_label=detector.by_label, attributes=True)]
            for things, one in zip(detector.detect(shown, asked), asked, strict=True)
        ]
        assert mine == [[(b.iou, b.color, b.shape) for b in boxes] for boxes in per_image(shown, asked)]
    (blank,) = match([], layout((A, "a red circle")), by_label=False, attributes=True)
    assert (blank.color, blank.shape) == (False, False)
    (blank,) = match([], layout((A, "a red circle")), by_label=False)
    assert (blank.color, blank.shape) == (None, None)


class Fake(Detector):
    """Answers from the truth, with faults. Images are told apart by their pixels."""

    name, by_label, attributes = "fake", True, False

    def __init__(self, *, jitter: float = 0.0, wrong_label: bool = False, extra: int = 0, copies_layout: bool = False):
        images, layouts = scenes()
        self.truth = {image.tobytes(): one for image, one in zip(images, layouts, strict=True)}
        self.jitter, self.wrong_label, self.extra, self.copies_layout = jitter, wrong_label, extra, copies_layout

    def fingerprint(self) -> str:
        return "0" * 64

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        rng = np.random.default_rng(0)
        out = []
        for image, asked in zip(images, layouts, strict=True):
            things = []
            for box in asked.boxes if self.copies_layout else self.truth[image.tobytes()].boxes:
                moved = np.array(box.xyxy) + self.jitter * rng.normal(size=4) * np.array([box.width, box.height] * 2)
                xyxy = tuple(moved.tolist())
                things.append(Detection(xyxy, "a dog" if self.wrong_label else box.phrase, 0.9))
            for _ in range(self.extra):
                left, top = rng.uniform(0, 0.7, 2)
                label = asked.boxes[0].phrase
                things.append(Detection((left, top, left + 0.3, top + 0.3), label, 0.3))
            out.append(things)
        return out


class Anywhere(Fake):
    """Many boxes everywhere, of every phrase that is asked for, whatever the image."""

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        rng = np.random.default_rng(1)
        out = []
        for _, asked in zip(images, layouts, strict=True):
            places = rng.uniform(0, 0.8, (300, 2))
            sizes = rng.uniform(0.1, 0.5, (300, 2))
            out.append(
                [
                    Detection((x, y, min(x + w, 1), min(y + h, 1)), asked.boxes[n % len(asked.boxes)].phrase, 0.5)
                    for n, ((x, y), (w, h)) in enumerate(zip(places.tolist(), sizes.tolist(), strict=True))
                ]
            )
        return out


def test_the_exact_reader_is_trusted_and_sees_shifts() -> None:
    result = self_test(open_detector(), *scenes())
    assert result.verdict == "trusted"
    assert result.reasons == ()
    assert result.true.recall > 0.97
    assert result.true.precision > 0.97
    assert result.true.label_agreement > 0.97
    assert result.shuffled.recall < 0.2
    assert result.slope == pytest.approx(1, abs=0.06)  # its boxes are the truth's to within a quarter of a pixel
    assert result.true.boxes == sum(len(one.boxes) for one in scenes()[1])
    assert str(result).startswith("shapes: trusted (recall")
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["true"]["recall"] == result.true.recall
    assert result == self_test(open_detector(), *scenes())


def test_a_perfect_answer_has_the_figures_of_perfection() -> None:
    result = self_test(Fake(), *scenes())
    assert (result.true.recall, result.true.precision, result.true.miou, result.true.label_agreement) == (1, 1, 1, 1)
    assert result.slope == pytest.approx(1)
    assert result.verdict == "trusted"
    assert (result.images, result.unknown) == (24, 0)


@pytest.mark.parametrize(
    ("fake", "verdict", "blamed"),
    [
        (Fake(copies_layout=True), "useless", "margin"),  # it repeats what is asked, and looks at nothing
        (Anywhere(), "useless", "margin"),
        (Fake(wrong_label=True), "useless", "recall"),
        (Fake(jitter=2.0), "useless", "recall"),
        (Fake(jitter=0.12), "weak", "miou"),
        (Fake(extra=12), "weak", "precision"),
    ],
)
def test_bad_detectors_are_seen_through(fake: Detector, verdict: str, blamed: str) -> None:
    result: SelfTest = self_test(fake, *scenes())
    assert result.verdict == verdict
    assert any(reason.startswith(f"{blamed} is ") for reason in result.reasons), result.reasons
    figures = {**result.to_dict()["true"], "margin": result.margin, "slope": result.slope}
    limits = USELESS if verdict == "useless" else TRUSTED
    assert len(result.reasons) == sum(figures[key] < least for key, least in limits.items())


def test_boxes_of_phrases_that_it_does_not_know_are_left_out_and_counted() -> None:
    images, layouts = scenes()
    more = [replace(one, boxes=(*one.boxes, Box(A, "a dog"))) for one in layouts]
    result, plain = self_test(open_detector(), images, more), self_test(open_detector(), images, layouts)
    assert result.unknown == len(layouts)
    assert replace(result, unknown=0) == plain
    with pytest.raises(InputError, match="knows none of the phrases"):
        self_test(open_detector(), images, [layout((A, "a dog"))] * len(images))
    with pytest.raises(InputError, match="a self-test of 1 image"):
        self_test(open_detector(), images[:1], layouts[:1])
    with pytest.raises(ValueError, match="24 images, but 3 layouts"):
        self_test(open_detector(), images, layouts[:3])


def test_shifts_go_to_where_there_is_room() -> None:
    moved = shifted(layout((A, "x"), ((0.6, 0.6, 1.0, 1.0), "x"), ((0.0, 0.0, 1.0, 1.0), "x")), 0.1)
    assert [box.xyxy for box in moved.boxes] == [
        pytest.approx((0.04, 0.04, 0.44, 0.44)),
        pytest.approx((0.56, 0.56, 0.96, 0.96)),
        pytest.approx((0.1, 0.1, 1.0, 1.0)),
    ]
    assert box_iou([A], [moved.boxes[0].xyxy])[0, 0] == pytest.approx(0.81 / 1.19)
