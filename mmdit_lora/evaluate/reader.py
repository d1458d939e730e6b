"""Fidelity to a layout of pictures of coloured shapes, read exactly: no learned network.

Pictures are read first (`ink`: where each object is, its colour, its shape), without the layout; only then are boxes
matched to what was seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmdit_lora.data.shapes import COLORS, SHAPES, phrase_attributes
from mmdit_lora.errors import InputError
from mmdit_lora.evaluate.detectors.common import Detection
from mmdit_lora.evaluate.detectors.matching import BoxMatch, match
from mmdit_lora.evaluate.ink import read
from mmdit_lora.layout import Layout

Pictures = NDArray[np.uint8] | Sequence[Image.Image]

_COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Fidelity:
    """Means over boxes: of the IoU, of IoU >= 0.5, of right colours, of right shapes; and the number of boxes."""

    miou: float
    iou50: float
    color_acc: float
    shape_acc: float
    boxes: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def readable(layouts: Iterable[Layout]) -> bool:
    """Whether the reader can judge these layouts: at least one box, and every phrase is one that it knows."""
    phrases = [box.phrase for layout in layouts for box in layout.boxes]
    return bool(phrases) and all(phrase_attributes(phrase) is not None for phrase in phrases)


def measure(images: Pictures, layouts: Sequence[Layout]) -> Fidelity:
    """Fidelity of pictures to layouts, over all boxes of all pictures.

    Args:
        images: PIL images, or (B, H, W, 3) uint8.

    Raises:
        ValueError: not as many images as layouts.
        InputError: no boxes at all, or a phrase that the reader does not know.
    """
    return summarise([box for boxes in per_picture(images, layouts) for box in boxes])


def summarise(boxes: Sequence[BoxMatch]) -> Fidelity:
    """The means over `boxes` (of all pictures, or of a bootstrap sample of them).

    Raises:
        InputError: there are none.
    """
    if not boxes:
        raise InputError("these layouts hold no boxes: there is nothing to measure", cure="give layouts with boxes")
    table = np.array([(box.iou, box.iou >= 0.5, bool(box.color), bool(box.shape)) for box in boxes], dtype=np.float64)
    miou, iou50, color_acc, shape_acc = table.mean(axis=0).tolist()
    return Fidelity(miou=miou, iou50=iou50, color_acc=color_acc, shape_acc=shape_acc, boxes=len(boxes))


def per_picture(images: Pictures, layouts: Sequence[Layout]) -> list[list[BoxMatch]]:
    """One reading per box, per picture, in the layout's order. Arguments and errors as in `measure` (no boxes are fine)."""
    if len(images) != len(layouts):
        raise ValueError(f"{len(images)} images, but {len(layouts)} layouts")
    return [_match(seen, layout) for seen, layout in zip(detect_all(images), layouts, strict=True)]


def detect(image: Image.Image | NDArray[np.uint8]) -> list[Detection]:
    """The objects of one picture (PIL, or (H, W, 3) uint8), largest first."""
    return detect_all([image] if isinstance(image, Image.Image) else np.asarray(image)[None])[0]


def detect_all(images: Pictures) -> list[list[Detection]]:
    """The objects of every picture, largest first. Pictures of one size are read together, which is many times faster.

    Raises:
        ValueError: an array is not (B, H, W, 3) uint8.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"pictures are {images.dtype} {images.shape}, not uint8 (B, H, W, 3)")
        arrays = list(images)
    else:
        arrays = [np.asarray(image.convert("RGB")) for image in images]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, array in enumerate(arrays):
        sizes.setdefault(array.shape, []).append(index)
    out: list[list[Detection]] = [[] for _ in arrays]
    for indices in sizes.values():
        for start in range(0, len(indices), 64):  # larger batches fall out of the CPU's caches
            part = indices[start : start + 64]
            for thing in read(np.stack([arrays[index] for index in part])):
                color, shape = _COLOR_NAMES[thing.color], None if thing.shape is None else SHAPES[thing.shape]
                label = f"{color} {shape or 'thing'}"
                out[part[thing.picture]].append(Detection(thing.xyxy, label, color=color, shape=shape))
    return out


def _match(seen: list[Detection], layout: Layout) -> list[BoxMatch]:
    """Boxes to detections; raises `InputError` for a phrase that the reader does not know."""
    for index, box in enumerate(layout.boxes):
        if phrase_attributes(box.phrase) is None:
            raise InputError(
                f"the reader does not know the phrase {box.phrase!r}",
                where=f"boxes[{index}]",
                cure=f"it reads phrases like 'a red circle': {', '.join(COLORS)}; {', '.join(SHAPES)}",
            )
    return match(seen, layout, by_label=False, attributes=True)
