"""Boxes as people write them: order and unit of the four numbers, what is clipped at an image's edge, which reading fits a set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BBOX_FORMATS = ("xyxy", "xywh", "cxcywh")
BBOX_UNITS = ("relative", "pixel", "permille")
Four = tuple[float, float, float, float]
Boxes = Sequence[Sequence[float]] | NDArray[np.float64]

# Tools count pixels from 0 or from 1, with or without the last one, and round. A box that leaves its image by at most
# this share of the side, or by so many pixels where that is more, is clipped and counted; beyond it is an error.
EDGE_SHARE, EDGE_PIXELS = 0.02, 2
ROUNDING = 1e-3  # of the side: clipped without a word
EDGE_RULE = f"a box may leave its image by {EDGE_SHARE:.0%} of the side or by {EDGE_PIXELS} pixels, and is clipped"

_ENOUGH_BOXES = 5  # before a reading is doubted at all; and wrong ones, before that of a larger set is
_ENOUGH_SHARE = 0.2
_ENOUGH_TO_REACH = 12  # boxes, some of which are at the right and at the lower side of images
_NEARLY_ALL = 0.02  # of the boxes may be wrong under a reading that is proposed
_SAME = 0.01  # of the side: nearer to the upper left corner, xyxy and xywh say the same


def corners(numbers: Sequence[float], order: str) -> Four:
    """(left, top, right, bottom) of four numbers in an order, in their own unit."""
    a, b, c, d = numbers
    if order == "xywh":
        return a, b, a + c, b + d
    if order == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return (a, c, b, d) if order == "xxyy" else (a, b, c, d)


def full_size(unit: str, size: tuple[int, int] | None) -> tuple[float, float]:
    """(width, height) of an image in a unit: "relative", "permille", "percent" or "pixel", for which `size` is needed."""
    if unit == "pixel":
        assert size is not None
        return size
    side = {"relative": 1, "permille": 1000, "percent": 100}[unit]
    return side, side


def overshoot(xyxy: Four) -> tuple[float, float]:
    """How far a relative box leaves its image, to left or right and above or below; 0 where it does not."""
    left, top, right, bottom = xyxy
    return max(-left, right - 1, 0.0), max(-top, bottom - 1, 0.0)


def within_edge(xyxy: Four, size: tuple[int, int] | None) -> bool:
    """Whether a relative box leaves its image by no more than is clipped; `size` in pixels, where it is known."""
    return all(
        by <= max(EDGE_SHARE, EDGE_PIXELS / side if side else 0) + 1e-9
        for by, side in zip(overshoot(xyxy), size or (0, 0), strict=True)
    )


def clip(xyxy: Four) -> Four:
    """The part of a relative box inside the image (without area, or inverted, where there is none)."""
    left, top, right, bottom = xyxy
    return min(max(left, 0.0), 1.0), min(max(top, 0.0), 1.0), min(max(right, 0.0), 1.0), min(max(bottom, 0.0), 1.0)


def box_iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """IoU of every xyxy box of `a` (A, 4) with every one of `b` (B, 4), in the same units: (A, B); 0 where the union has no
    area. For tensors `torchvision.ops.box_iou` gives the same; the commands that read data do not load torch."""
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (a, b))
    sides = np.minimum(first[:, None, 2:], second[:, 2:]) - np.maximum(first[:, None, :2], second[:, :2])
    both = sides.clip(min=0).prod(-1)
    areas = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second))
    union = np.add.outer(*areas) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


@dataclass
class EdgeCount:
    """Boxes that left their image by little and were clipped.

    Args:
        boxes: how many. most: how far the farthest left it, as a share of the side. places: where the first few are.
    """

    boxes: int = 0
    most: float = 0.0
    places: list[str] = field(default_factory=list)

    def add(self, by: float, location: str) -> None:
        """Count one box that left its image by this share of the side, unless it was rounding."""
        if by > ROUNDING:
            self.boxes += 1
            self.most = max(self.most, by)
            if len(self.places) < 3:
                self.places.append(location)

    def merge(self, other: EdgeCount) -> None:
        """Count another one's boxes too."""
        self.boxes += other.boxes
        self.most = max(self.most, other.most)
        self.places = [*self.places, *other.places][:3]

    @property
    def message(self) -> str | None:
        """One line for people; None where nothing was clipped."""
        if not self.boxes:
            return None
        what = "1 box leaves its image" if self.boxes == 1 else f"{self.boxes} boxes leave their images"
        first = ", ".join(self.places) + (", ..." if self.boxes > len(self.places) else "")
        return f"{what} by at most {self.most:.1%} of the side and {'was' if self.boxes == 1 else 'were'} clipped ({first})"


class Reading(NamedTuple):
    """One way to read four numbers: one of `BBOX_FORMATS` in one of `BBOX_UNITS`."""

    order: str
    unit: str

    @property
    def allows(self) -> str:
        """What four numbers under this reading are, in words."""
        four = {
            "xyxy": "[left, top, right, bottom], left < right, top < bottom",
            "xywh": "[left, top, width, height]",
            "cxcywh": "[center x, center y, width, height]",
        }
        sides = {"relative": "sides run from 0 to 1", "permille": "sides run from 0 to 1000", "pixel": "in pixels"}
        return f"{four[self.order]}; {sides[self.unit]}"


READINGS = tuple(Reading(order, unit) for unit in BBOX_UNITS for order in BBOX_FORMATS)


class Boxed(NamedTuple):
    """Boxes of one image as they stand, four finite numbers each, and its size in pixels, where that is known."""

    numbers: Sequence[Four]
    size: tuple[int, int] | None = None


def relative(numbers: Sequence[float], reading: Reading, size: tuple[int, int] | None) -> Four:
    """Relative xyxy of four numbers under a reading, not clipped."""
    left, top, right, bottom = corners(numbers, reading.order)
    width, height = full_size(reading.unit, size)
    return left / width, top / height, right / width, bottom / height


@dataclass(frozen=True)
class Evidence:
    """How many boxes of a set are wrong under each reading.

    Args:
        declared: how the set states that they are read. total: boxes. wrong: reading -> boxes that leave their image, are
            inverted or empty. misread: those of the declared reading that are not merely empty. reach: reading -> how far to
            the right and down the boxes reach, the smaller of the two; 1 is the image's side.
    """

    declared: Reading
    total: int
    wrong: dict[Reading, int]
    misread: int
    reach: dict[Reading, float]

    @property
    def line(self) -> str:
        """The shares as one sentence: the three orders in the declared unit, and what fits better in another."""
        shown = [
            reading
            for reading, wrong in self.wrong.items()
            if reading.unit == self.declared.unit or wrong < min(self.wrong[self.declared], self.total)
        ]
        shown.sort(key=lambda reading: reading.unit != self.declared.unit)
        parts = [
            f"{self.wrong[reading] / self.total:.1%} as {self.name(reading)}{' (declared)' * (reading == self.declared)}"
            for reading in shown
        ]
        return f"boxes that leave their image, are inverted or empty: {', '.join(parts)}"

    def name(self, reading: Reading) -> str:
        return reading.order if reading.unit == self.declared.unit else f"{reading.order} {reading.unit}"

    @property
    def proposed(self) -> list[Reading]:
        """Readings that explain the set where the declared one does not: several where they fit equally well.

        None where there are few boxes, or few are wrong: of 30 boxes one is a mistake of its own. None where no other
        reading makes nearly all of them right.
        """
        if self.total < _ENOUGH_BOXES:
            return []
        wrong = self.wrong[self.declared]
        enough = self.misread >= _ENOUGH_BOXES and self.misread >= _ENOUGH_SHARE * self.total
        if not (enough or self.misread > self.total / 2):
            return []
        right = {r: n for r, n in self.wrong.items() if n <= _NEARLY_ALL * self.total and 4 * n < wrong}
        if not right:
            return []

        def cost(reading: Reading) -> tuple[int, int]:
            changes = (reading.order != self.declared.order) + (reading.unit != self.declared.unit)
            return changes, right[reading]

        best = min(map(cost, right))
        equal = [reading for reading in right if cost(reading) == best]
        if self.total < _ENOUGH_TO_REACH:
            return equal
        # Numbers up to 640 fit pixels and thousandths alike; but boxes of a whole set reach the far sides of images.
        farthest = max(min(self.reach[reading], 1.0) for reading in equal)
        return [reading for reading in equal if self.reach[reading] > 0.8 * farthest]

    def declaration(self, reading: Reading) -> str:
        """What to write, where a reading other than the declared one is right."""
        keys = {"bbox_format": (reading.order, self.declared.order), "bbox_units": (reading.unit, self.declared.unit)}
        return ", ".join(f'"{key}": "{meant}"' for key, (meant, stated) in keys.items() if meant != stated)

    @property
    def hint(self) -> str | None:
        """What to declare, where something is proposed; None where nothing is."""
        if not self.proposed:
            return None
        ways = " or ".join(self.declaration(reading) for reading in self.proposed)
        sure = "" if len(self.proposed) == 1 else "if that is what they are, "
        return f"{sure}declare {ways}"

    @property
    def beside_error(self) -> str | None:
        """What stands beside an error of boxes: the shares under each reading, and what to declare where one explains them.

        None where there are too few boxes to tell, or they are merely empty, which no reading explains.
        """
        if self.total < _ENOUGH_BOXES or not self.misread:
            return None
        return "; ".join(part for part in (self.line, self.hint) if part)


def evidence(sets: Iterable[Boxed], declared: Reading) -> Evidence | None:
    """Count what is wrong under each reading; None where there is no box."""
    sets = [boxed for boxed in sets if boxed.numbers]
    if not sets:
        return None
    numbers = np.array([four for boxed in sets for four in boxed.numbers], dtype=np.float64)
    # An image of no known size may be as large as any box reaches.
    largest = max(1.0, float(np.abs(numbers).max()) * 2)
    sizes = np.array([boxed.size or (largest, largest) for boxed in sets], dtype=np.float64)
    known = np.array([boxed.size is not None for boxed in sets])
    slack = np.where(known[:, None], np.maximum(EDGE_SHARE, EDGE_PIXELS / sizes), EDGE_SHARE) + 1e-9
    sizes, slack = (np.repeat(each, [len(boxed.numbers) for boxed in sets], axis=0) for each in (sizes, slack))
    wrong, misread = {}, 0
    reach: dict[Reading, float] = {}
    for reading in READINGS:
        sides = sizes if reading.unit == "pixel" else full_size(reading.unit, None)
        with np.errstate(over="ignore", invalid="ignore"):
            xyxy: np.ndarray = np.stack(corners(numbers.T, reading.order), axis=1)  # type: ignore[arg-type]
            low, high = xyxy[:, :2] / sides, xyxy[:, 2:] / sides
            inside = ((low >= -slack) & (high <= 1 + slack)).all(axis=1)
            empty = (np.clip(low, 0, 1) >= np.clip(high, 0, 1)).any(axis=1)
        if reading.unit != "relative":  # no annotated box is a pixel, or a thousandth, wide and high
            empty |= (np.abs(numbers) <= 1).all(axis=1)
        reach[reading] = float(high.max(axis=0).min())
        wrong[reading] = int((~inside | empty).sum())
        if reading == declared:
            misread = int((~inside | (high < low).any(axis=1)).sum())
    return Evidence(declared, len(numbers), wrong, misread, reach)


def distinct_as_xywh(boxes: Iterable[Four]) -> int:
    """How many different boxes of relative numbers xyxy and xywh read differently: those away from the left and upper edge."""
    return len({tuple(four) for four in boxes if four[0] > _SAME or four[1] > _SAME})


def four_numbers(value: Any) -> Four | None:
    """Four finite numbers of a list, else None."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        return None
    try:
        a, b, c, d = map(float, value)
    except OverflowError:  # an int that no float holds
        return None
    return (a, b, c, d) if math.isfinite(a) and math.isfinite(b) and math.isfinite(c) and math.isfinite(d) else None
