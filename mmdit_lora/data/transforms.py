"""A picture and its layout at the size that the model takes: torchvision v2, boxes as `tv_tensors.BoundingBoxes`."""

from __future__ import annotations

import re

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout

# A box of which less than this share is left after the crop describes something that is no longer to be seen.
MIN_VISIBLE = 0.25
_SIDES = re.compile(r"\b(left|right)(most|ward|wards)?\b", re.IGNORECASE)


def prepare(
    image: Image.Image,
    layout: Layout,
    size: tuple[int, int],
    *,
    crop: str = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Layout]:
    """Resize until the picture covers `size` (no distortion), crop what is over, mirror every second one.

    Args:
        image: RGB.
        size: (height, width) in pixels.
        crop: "center" | "random".
        flip: mirror with probability 1/2, unless the caption or a phrase says left or right.
        generator: what random crops and flips are drawn from; None = PyTorch's global one.

    Returns:
        pixels: (3, height, width) float in [-1, 1].
        layout: with the boxes where they are now, clipped to the picture; a box of which less than a quarter is left is
            dropped with its phrase.

    Raises:
        InputError: `crop` is neither.
    """
    if crop not in ("center", "random"):
        raise InputError(f"crop is {crop!r}", cure="give center or random")
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    pixels: Tensor = tv_tensors.Image(F.pil_to_tensor(image))
    boxes = _to_pixels(layout, image.height, image.width)
    if resized != (image.height, image.width):
        pixels = F.resize(pixels, list(resized), interpolation=InterpolationMode.BICUBIC, antialias=True)
        boxes = F.resize(boxes, list(resized))
    areas = _areas(boxes)

    over = (resized[0] - height, resized[1] - width)
    if crop == "random":
        top, left = (int(torch.randint(extra + 1, (1,), generator=generator)) for extra in over)
    else:
        top, left = over[0] // 2, over[1] // 2
    pixels = F.crop(pixels, top, left, height, width)
    boxes = F.clamp_bounding_boxes(F.crop(boxes, top, left, height, width), clamping_mode="hard")
    visible = _areas(boxes) >= MIN_VISIBLE * areas

    # Drawn for every picture, so that what its text says does not shift the draws of the next.
    if flip and bool(torch.rand(1, generator=generator) < 0.5) and not _names_a_side(layout):
        pixels, boxes = F.horizontal_flip(pixels), F.horizontal_flip(boxes)

    relative = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height], dtype=torch.float64)
    kept = tuple(
        Box(xyxy=tuple(corner), phrase=box.phrase)
        for box, corner, seen in zip(layout.boxes, relative.tolist(), visible.tolist(), strict=True)
        if seen and corner[0] < corner[2] and corner[1] < corner[3]
    )
    return pixels.as_subclass(Tensor).float() / 127.5 - 1, Layout(caption=layout.caption, boxes=kept)


def _to_pixels(layout: Layout, height: int, width: int) -> tv_tensors.BoundingBoxes:
    corners = torch.tensor([box.xyxy for box in layout.boxes], dtype=torch.float64).reshape(-1, 4)
    return tv_tensors.BoundingBoxes(
        corners * torch.tensor([width, height, width, height], dtype=torch.float64),
        format="XYXY",
        canvas_size=(height, width),
        clamping_mode=None,  # crop would clamp, and the visible share be taken of what it left
    )


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def _names_a_side(layout: Layout) -> bool:
    return any(_SIDES.search(text) for text in (layout.caption, *(box.phrase for box in layout.boxes)))
