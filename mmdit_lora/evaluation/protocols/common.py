"""What the published protocols share: cases read from their files, what was seen in their images, and the base class.

A protocol sees no model. Detections and answers come as plain data (`Seen`), from any detector and any judge; the formulas
are functions of these alone, so that they can be checked by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image

from mmdit_lora.data.formats.common import Context, RawBox, Unit, four, need, number
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout

XYXY = tuple[float, float, float, float]


class Detected(Protocol):
    """A detection, whoever made it: `xyxy` relative to the image, `label` what it is, `score` in [0, 1]."""

    @property
    def xyxy(self) -> XYXY: ...
    @property
    def label(self) -> str: ...
    @property
    def score(self) -> float: ...


@dataclass(frozen=True)
class Thing:
    """One box that was asked for.

    Args:
        xyxy: relative to the image, as the file says it: neither clipped nor rounded. Formulas use it.
        label: what a detector is asked for. phrase: what a model is asked to paint there.
        detail: the longer description; "" where the set has none.
        key: names the thing in its case ("0", "1", ... or the set's own name).
    """

    xyxy: XYXY
    label: str
    phrase: str
    detail: str = ""
    key: str = ""


@dataclass(frozen=True)
class Case:
    """One layout of a benchmark.

    Args:
        id: names the case. where: its place in the file.
        layout: what a model is given: caption, and the boxes clipped to the image (those without area left out).
        size: (width, height) in pixels that the set states. things: the boxes as the formulas use them, all of them.
        images: names of the images that the set's own tools expect, for messages and for whoever writes them.
        keys: what `PublishedProtocol.key` makes of the files that are this case's images.
        extra: what else the formulas need.
    """

    id: str
    layout: Layout
    size: tuple[int, int]
    things: tuple[Thing, ...]
    images: tuple[str, ...]
    keys: tuple[str, ...]
    location: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What was seen in one image of a case.

    Args:
        detections: None where no detector looked.
        answers: key of a question -> yes, no, or None where the judge said neither; None where no judge was asked.
        measured: figures read from the pixels themselves, by `PublishedProtocol.measure`.
        image: the file, relative to the folder of images.
    """

    detections: Sequence[Detected] | None = None
    answers: Mapping[str, bool | None] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    image: str = ""


@dataclass(frozen=True)
class Question:
    """A question with yes or no for an answer.

    Args:
        xyxy: the part of the image that it is about, relative; None: all of it.
        after: key of the question that must have been answered yes before this one is asked.
    """

    key: str
    text: str
    xyxy: XYXY | None = None
    after: str | None = None


class PublishedProtocol(ABC):
    """A benchmark as its authors compute it.

    Attributes:
        name: key in `PROTOCOLS`. title: for people. source: repository and commit, or paper, that the formulas follow.
        metrics: key of a score -> what it is. Scores are shares in [0, 1].
        parts: name of a part of the images -> the key of a metric over that part, with "{}" for the metric's own.
        detector, judge: what it takes: "needed", "optional" (scores that need it are left out without it), or "unused".
        several: whether a case may have several images (of several seeds), each of which counts.
        deviations: where this differs from what the authors run.
    """

    name: str
    title: str
    source: str
    metrics: Mapping[str, str]
    parts: Mapping[str, str] = MappingProxyType({})
    detector: str = "needed"
    judge: str = "unused"
    several: bool = False
    deviations: tuple[str, ...] = ()

    @abstractmethod
    def read(self, path: str | Path) -> list[Case]:
        """The cases of the set's own file or folder, unchanged.

        Raises:
            InputError: missing or malformed, with file and line, row or key; or it holds no case.
        """

    @abstractmethod
    def score(self, cases: Sequence[Case], seen: Sequence[Seen]) -> dict[str, float]:
        """The figures. `seen[i]` is of an image of `cases[i]`; a case with several images stands several times.

        Raises:
            ValueError: not as many of one as of the other.
        """

    @abstractmethod
    def write_results(self, cases: Sequence[Case], seen: Sequence[Seen], out: str | Path) -> list[Path]:
        """Write the files that the set's own tools write, by their names, into the folder `out`; each whole or not at all."""

    def keys(self) -> list[str]:
        """The keys of all scores that `score` may give: metrics over all images, then over each part."""
        return [*self.metrics, *(form.format(metric) for form in self.parts.values() for metric in self.metrics)]

    def key(self, image: PurePath) -> str:
        """What ties a file (relative to the folder of images) to a case; "" for files that are none of its images."""
        return image.stem

    def queries(self, case: Case) -> Layout:
        """What a detector is asked for: the layout with labels for phrases."""
        boxes = [Box(box.xyxy, thing.label) for box, thing in zip(case.layout.boxes, painted(case), strict=True)]
        return Layout(case.layout.caption, tuple(boxes))

    def questions(self, case: Case, seen: Seen = Seen()) -> list[Question]:  # noqa: ARG002 (frozen)
        """What a judge is asked about an image of the case, in order; `seen` holds what was detected in it."""
        return []

    def measure(self, case: Case, image: Image.Image) -> dict[str, float]:  # noqa: ARG002
        """What is read from the image's pixels without a network (`Seen.measured`)."""
        return {}


def painted(case: Case) -> list[Thing]:
    """The things that are in the case's layout: those with an area inside the image, in order."""
    return [thing for thing in case.things if clipped(thing.xyxy) is not None]


def clipped(xyxy: XYXY) -> XYXY | None:
    """The part of a relative box inside the image; None where that has no area."""
    x0, y0, x1, y1 = max(xyxy[0], 0.0), max(xyxy[1], 0.0), min(xyxy[2], 1.0), min(xyxy[3], 1.0)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def raw_box(said: RawBox, path: Path, unit: Unit, size: tuple[int, int]) -> XYXY:
    """A file's xyxy box as relative numbers, neither clipped nor rounded.

    Raises:
        InputError: not four finite numbers, inverted, or far outside the image.
    """
    Context(path).box(said.value, "xyxy", said.location, unit=unit, size=size, around=True)  # for what it refuses
    x0, y0, x1, y1 = four(said.value, said.location)
    width, height = size if unit == "pixel" else (1, 1)
    return (x0 / width, y0 / height, x1 / width, y1 / height)


def layout_of(caption: str, things: Sequence[Thing], location: str) -> Layout:
    """The layout that a model is given. Raises `InputError` with the place where a phrase is no text."""
    boxes = []
    for thing in things:
        if (inside := clipped(thing.xyxy)) is not None:
            try:
                boxes.append(Box(inside, thing.phrase))
            except InputError as error:
                raise error.at(f"{location}: {thing.key}") from None
    return Layout(caption, tuple(boxes))


def checked(cases: list[Case], path: str | Path) -> list[Case]:
    """The cases. Raises `InputError` where there is none, where two would have the same images, or one has no box."""
    if not cases:
        raise InputError("holds no case", location=str(path))
    owners: dict[str, Case] = {}
    for case in cases:
        if not case.things:
            raise InputError("has no box", location=case.location)
        for key in case.keys:
            if key in owners and owners[key].location != case.location:
                raise InputError(
                    f"has the same images ({case.images[0]}) as {owners[key].location}", location=case.location
                )
            owners[key] = case
    return cases


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two xyxy boxes in the same units; 0 where the union has no area."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(across, 0.0) * max(down, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def labelled(seen: Seen, label: str) -> list[Detected]:
    """The detections with that label (case and spaces at the ends do not count)."""
    wanted = label.strip().lower()
    return [found for found in seen.detections or () if found.label.strip().lower() == wanted]


def best(thing: Thing, found: Sequence[Detected]) -> tuple[float, Detected | None]:
    """The highest IoU of a thing with any of the detections, and that detection (the first of equals); (0, None) for none."""
    top, which = 0.0, None
    for one in found:
        value = iou(thing.xyxy, one.xyxy)
        if value > top:
            top, which = value, one
    return top, which


def yes(seen: Seen, key: str) -> bool:
    """Whether the judge said yes; no answer is no, as in the authors' code."""
    return (seen.answers or {}).get(key) is True


def paired(cases: Sequence[Case], seen: Sequence[Seen]) -> list[tuple[Case, Seen]]:
    """Cases and what was seen. Raises `ValueError` where the counts differ, or there is nothing."""
    if len(cases) != len(seen) or not cases:
        raise ValueError(f"{len(cases)} cases, but {len(seen)} images seen")
    return list(zip(cases, seen, strict=True))


def share(count: float, total: int) -> float:
    """`count / total`, 0 of nothing."""
    return count / total if total else 0.0


def stated_size(row: Any, location: str) -> tuple[int, int]:
    """(width, height) in pixels that a row says. Raises `InputError` where they are missing or not above 0."""
    width, height = (int(number(need(row, key, location), location)) for key in ("width", "height"))
    if min(width, height) <= 0:
        raise InputError(f"says {width} x {height} pixels", location=location)
    return width, height
