"""`data synthesize`: images and boxes that a base and a detector make of captions."""

from __future__ import annotations

import pytest

from mmdit_lora.data.captions import Caption
from mmdit_lora.evaluation.detectors import Detection, open_detector
from mmdit_lora.evaluation.detectors.base import agrees
from mmdit_lora.evaluation.synthesize import MISSING, NOTHING, UNNAMED, boxes_of

PLACES = [(0.1 * n, 0.1, 0.1 * n + 0.08, 0.3) for n in range(9)]


class Learned:
    """Of a detector, what `boxes_of` asks; it finds what it knows and no attributes."""

    attributes = False
    agrees = staticmethod(agrees)


def found(*labels: str, scores: tuple[float, ...] = ()) -> list[Detection]:
    scored = zip(labels, scores or [1.0] * len(labels), strict=True)
    return [Detection(place, label, score) for place, (label, score) in zip(PLACES, scored, strict=False)]


@pytest.mark.parametrize(
    ("phrases", "labels", "scores", "exact", "reason", "taken"),
    [
        (
            ["a red circle", "a blue square"],
            ["blue square", "red circle"],
            (),
            True,
            None,
            ["a blue square", "a red circle"],
        ),
        (["a red circle", "a red circle"], ["red circle", "red circle"], (), True, None, ["a red circle"] * 2),
        (["a red circle", "a red circle"], ["red circle"], (), True, MISSING, None),
        (["a red circle"], ["red circle", "red circle"], (), True, UNNAMED, None),
        (["a red circle"], ["red circle", "blue thing"], (), True, UNNAMED, None),
        (["a red circle"], ["blue thing"], (), True, MISSING, None),
        (["a red circle"], [], (), True, NOTHING, None),
        # A learned detector may see more than the caption names, and more than one of each.
        (["a dog"], ["dog", "dog", "sofa"], (), False, None, ["a dog", "a dog", "sofa"]),
        (["a dog", "a cat"], ["dog"], (), False, MISSING, None),
        (["a dog", "a cat"], ["dog", "cat"], (0.9, 0.3), False, MISSING, None),
        (["a dog", "a cat"], ["cat", "dog", "cat"], (0.5, 0.9, 0.2), False, None, ["a cat", "a dog", "a cat"]),
    ],
)
def test_doubtful_images_are_told(
    phrases: list[str],
    labels: list[str],
    scores: tuple[float, ...],
    exact: bool,
    reason: str | None,
    taken: list[str] | None,
) -> None:
    detector = open_detector("shapes") if exact else Learned()
    boxes, why = boxes_of(Caption("", tuple(phrases)), found(*labels, scores=scores), detector, 0.4)  # type: ignore[arg-type]
    assert why == reason
    if taken is not None:
        assert [box.phrase for box in boxes] == taken
        assert [box.xyxy for box in boxes] == PLACES[: len(labels)]


def test_pieces_of_a_plain_caption_need_not_all_be_objects() -> None:
    caption = Caption("a dog on a sunny day", ("a dog", "a sunny day"), stated=False)
    boxes, why = boxes_of(caption, found("dog"), Learned(), 0.4)  # type: ignore[arg-type]
    assert why is None
    assert [box.phrase for box in boxes] == ["a dog"]
