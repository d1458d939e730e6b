"""What the published protocols share: cases read from their files, observations of their images, and the base class.

A protocol runs no model. Detections and answers come as plain data (`Observation`), from any detector and any judge; the
formulas are functions of these alone, so that they can be checked by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from PIL import Image

from mmdit_lora.boxes import box_iou
from mmdit_lora.boxes import clip as clip_box
from mmdit_lora.data.formats.common import Context, RawBox, Unit, four, need, number
from mmdit_lora.data.formats.tables import rows, table_files
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection
from mmdit_lora.layout import Box, Layout

XYXY = tuple[float, float, float, float]
MATCHED = 0.5  # the IoU from which a box counts as detected, in several protocols


@dataclass(frozen=True)
class Region:
    """One box of a case.

    Args:
        xyxy: relative to the image, as the file has it: neither clipped nor rounded. The formulas use it.
        label: what a detector looks for. phrase: what a model is asked for there.
        detail: the longer description; "" if the set has none.
        key: its name in the case ("0", "1", ... or the set's own name).
    """

    xyxy: XYXY
    label: str
    phrase: str
    detail: str = ""
    key: str = ""

    @property
    def inside(self) -> XYXY | None:
        """The part of the box inside the image; None if that has no area."""
        x0, y0, x1, y1 = clip_box(self.xyxy)
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


@dataclass(frozen=True)
class Case:
    """One layout of a benchmark.

    Args:
        id: names the case. location: its place in the file.
        size: (width, height) in pixels that the set states. regions: all boxes, as the formulas use them.
        images: names of the images that the set's own tools expect, for messages.
        keys: what `PublishedProtocol.key` makes of the files that are this case's images.
        extra: what else the formulas need.
        layout: what a model is given: caption, and the boxes clipped to the image (those without area left out).

    Raises:
        InputError: a phrase is no text.
    """

    id: str
    caption: str
    size: tuple[int, int]
    regions: tuple[Region, ...]
    images: tuple[str, ...]
    keys: tuple[str, ...]
    location: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        boxes = []
        for region in self.regions:
            if (inside := region.inside) is not None:
                try:
                    boxes.append(Box(inside, region.phrase))
                except InputError as error:
                    raise error.at(f"{self.location}: {region.key}") from None
        object.__setattr__(self, "layout", Layout(self.caption, tuple(boxes)))


@dataclass(frozen=True)
class Observation:
    """What was observed in one image of a case.

    Args:
        detections: None without a detector.
        answers: key of a question -> yes, no, or None if the judge said neither; None without a judge.
        measured: figures computed from the pixels themselves, by `PublishedProtocol.measure`.
        image: the file, relative to the folder of images.
    """

    detections: Sequence[Detection] | None = None
    answers: Mapping[str, bool | None] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    image: str = ""

    def labelled(self, label: str) -> list[Detection]:
        """The detections with that label (case and spaces at the ends do not count)."""
        return [d for d in self.detections or () if d.label.strip().lower() == label.strip().lower()]

    def yes(self, key: str) -> bool:
        """Whether the judge said yes; no answer is no, as in the authors' code."""
        return (self.answers or {}).get(key) is True


Pairs = list[tuple[Case, Observation]]


@dataclass(frozen=True)
class Question:
    """A yes-or-no question.

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
        detector, judge: "needed", "optional" (scores that need it are left out without it), or "unused".
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

    def read(self, path: str | Path) -> list[Case]:
        """The cases of the set's own file or folder, unchanged.

        Raises:
            InputError: missing or malformed, with file and line, row or key; no case, a case without boxes, or two with the
                same images.
        """
        cases = list(self._cases(Path(path)))
        if not cases:
            raise InputError("holds no case", location=str(path))
        owners: dict[str, Case] = {}
        for case in cases:
            if not case.regions:
                raise InputError("has no box", location=case.location)
            for key in case.keys:
                if (owner := owners.setdefault(key, case)).location != case.location:
                    what = f"has the same images ({case.images[0]}) as {owner.location}"
                    raise InputError(what, location=case.location)
        return cases

    def score(self, cases: Sequence[Case], observations: Sequence[Observation]) -> dict[str, float]:
        """The scores. `observations[i]` is of an image of `cases[i]`; a case with several images stands several times.

        Raises:
            ValueError: the numbers differ, or there is nothing.
        """
        if len(cases) != len(observations) or not cases:
            raise ValueError(f"{len(cases)} cases, but {len(observations)} images seen")
        return self._score(list(zip(cases, observations, strict=True)))

    @abstractmethod
    def _cases(self, path: Path) -> Iterable[Case]:
        """See `read`."""

    @abstractmethod
    def _score(self, pairs: Pairs) -> dict[str, float]:
        """See `score`."""

    @abstractmethod
    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """Write the files that the set's own tools write, by their names, into the folder `out`; each whole or not at all."""

    def keys(self) -> list[str]:
        """The keys of all scores that `score` may give: metrics over all images, then over each part."""
        return [*self.metrics, *(form.format(metric) for form in self.parts.values() for metric in self.metrics)]

    def key(self, image: PurePath) -> str:
        """What ties a file (relative to the folder of images) to a case; "" for files that are none of its images."""
        return image.stem

    def queries(self, case: Case) -> Layout:
        """What a detector looks for: the layout with labels for phrases."""
        boxes = [Box(r.inside, r.label) for r in case.regions if r.inside is not None]
        return Layout(case.caption, tuple(boxes))

    def questions(self, case: Case, observation: Observation = Observation()) -> list[Question]:  # noqa: ARG002 (frozen)
        """What a judge is asked about an image of the case, in order; `observation` has its detections."""
        return []

    def measure(self, case: Case, image: Image.Image) -> dict[str, float]:  # noqa: ARG002
        """What is computed from the image's pixels without a network (`Observation.measured`)."""
        return {}


def raw_box(said: RawBox, path: Path, unit: Unit, size: tuple[int, int] = (1, 1)) -> XYXY:
    """A file's xyxy box as relative numbers, neither clipped nor rounded.

    Raises:
        InputError: not four finite numbers, inverted, or far outside the image.
    """
    Context(path).box(said.value, "xyxy", said.location, unit=unit, size=size, around=True)  # for its checks
    x0, y0, x1, y1 = four(said.value, said.location)
    width, height = size if unit == "pixel" else (1, 1)
    return (x0 / width, y0 / height, x1 / width, y1 / height)


def table_rows(path: Path, *suffixes: str) -> Iterator[tuple[str, Any]]:
    """(location, row) of the tables of a file or folder. Raises `InputError` for what cannot be read."""
    for location, row in rows(table_files(Context(path), *suffixes), without=("image",)):
        if isinstance(row, InputError):
            raise row
        yield location, row


def image_size(row: Any, location: str) -> tuple[int, int]:
    """(width, height) in pixels that a row states. Raises `InputError` if they are missing or not above 0."""
    width, height = (int(number(need(row, key, location), location)) for key in ("width", "height"))
    if min(width, height) <= 0:
        raise InputError(f"says {width} x {height} pixels", location=location)
    return width, height


def best(xyxy: XYXY, detections: Sequence[Detection]) -> tuple[float, Detection | None]:
    """The highest IoU of a box with any detection, and that detection (the first of equals); (0, None) for none."""
    if not detections:
        return 0.0, None
    iou = box_iou([xyxy], [d.xyxy for d in detections])[0]
    index = int(iou.argmax())
    return float(iou[index]), detections[index] if iou[index] > 0 else None


def share(count: float, total: int) -> float:
    """`count / total`, 0 of nothing."""
    return count / total if total else 0.0
