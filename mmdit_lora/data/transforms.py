"""An image and its layout at the size that the model takes: torchvision v2, boxes as `tv_tensors.BoundingBoxes`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mmdit_lora.data.buckets import MIN_VISIBLE
from mmdit_lora.data.collate import to_pixels
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout

# Whole words, where "_" parts words as "-" does ("left_eye"); also those written as one ("lower-left", "topright",
# "left-handed"), but neither "copyright" nor "leftover" and "left-overs".
_SIDES = re.compile(
    r"(?<![^\W_])(?:top|bottom|upper|lower|cent(?:er|re)|far)?(?:left|right)"
    r"(?:most|wards?|hand(?:ed|er)?|side)?(?![^\W_])(?!-overs?\b)",
    re.IGNORECASE,
)


class Placement(NamedTuple):
    """Where an image goes: resized to `resized`, of which the window from `corner` on is kept.

    Args:
        resized: (height, width) in pixels, at least `size`. corner: (top, left) of the window. size: its (height, width).
    """

    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


def place(
    image: tuple[int, int], size: tuple[int, int], *, crop: str = "center", generator: torch.Generator | None = None
) -> Placement:
    """Cover `size` without distortion, and cut what is over: in the middle, or anywhere (two draws).

    Args:
        image, size: (height, width) in pixels. crop: "center" | "random".

    Raises:
        InputError: `crop` is neither.
    """
    if crop not in ("center", "random"):
        raise InputError(f"crop is {crop!r}", hint="give center or random")
    height, width = size
    scale = max(height / image[0], width / image[1])
    resized = (max(height, round(image[0] * scale)), max(width, round(image[1] * scale)))
    over = (resized[0] - height, resized[1] - width)
    if crop == "random":
        top, left = (int(torch.randint(extra + 1, (1,), generator=generator)) for extra in over)
    else:
        top, left = over[0] // 2, over[1] // 2
    return Placement(resized, (top, left), size)


def transform(
    image: Image.Image,
    layout: Layout,
    size: tuple[int, int],
    *,
    crop: str = "center",
    flip: bool = False,
    min_visible: float = MIN_VISIBLE,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Layout]:
    """Resize until the image covers `size` (no distortion), crop what is over, mirror every second one.

    Args:
        image: RGB.
        size: (height, width) in pixels.
        crop: "center" | "random".
        flip: mirror with probability 1/2, unless the caption or a phrase says left or right.
        min_visible: a box of which a smaller share is left is dropped with its phrase.
        generator: what random crops and flips are drawn from; None = PyTorch's global one.

    Returns:
        image: (3, height, width) uint8.
        layout: with the boxes where they are now, clipped to the image.

    Raises:
        InputError: `crop` is neither.
    """
    to = place((image.height, image.width), size, crop=crop, generator=generator)
    # Drawn for every image, so that what its text says does not shift the draws of the next.
    mirrored = flip and bool(torch.rand(1, generator=generator) < 0.5) and not names_a_side(layout)

    pixels: Tensor = tv_tensors.Image(F.pil_to_tensor(image))
    if to.resized != (image.height, image.width):
        pixels = F.resize(pixels, list(to.resized), interpolation=InterpolationMode.BICUBIC, antialias=True)
    pixels = F.crop(pixels, *to.corner, *size)
    if mirrored:
        pixels = F.horizontal_flip(pixels)
    moved = move_boxes(layout, (image.height, image.width), to, mirrored=mirrored, min_visible=min_visible)
    return pixels.as_subclass(Tensor), moved


def prepare(image: Image.Image, layout: Layout, size: tuple[int, int], **options: Any) -> tuple[Tensor, Layout]:
    """As `transform`, the pixels as a VAE takes them: float in [-1, 1]."""
    pixels, moved = transform(image, layout, size, **options)
    return to_pixels(pixels), moved


def move_boxes(
    layout: Layout,
    image: tuple[int, int],
    to: Placement,
    *,
    mirrored: bool = False,
    min_visible: float = MIN_VISIBLE,
) -> Layout:
    """The layout of an image of (height, width) pixels after `to`; boxes less visible than `min_visible` are left out."""
    boxes = _to_pixels(layout, *image)
    if to.resized != image:
        boxes = F.resize(boxes, list(to.resized))
    areas = _areas(boxes)
    boxes = F.clamp_bounding_boxes(F.crop(boxes, *to.corner, *to.size), clamping_mode="hard")
    visible = _areas(boxes) >= min_visible * areas
    if mirrored:
        boxes = F.horizontal_flip(boxes)
    height, width = to.size
    relative = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height], dtype=torch.float64)
    kept = tuple(
        Box(xyxy=tuple(corner), phrase=box.phrase)
        for box, corner, seen in zip(layout.boxes, relative.tolist(), visible.tolist(), strict=True)
        if seen and corner[0] < corner[2] and corner[1] < corner[3]
    )
    return Layout(caption=layout.caption, boxes=kept)


def augment_boxes(
    layout: Layout,
    *,
    jitter: float = 0.0,
    dropout: float = 0.0,
    phrase_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Layout, tuple[bool, ...]]:
    """Move the sides of boxes a little, leave boxes out, take phrases away: so that a layout need not be exact or complete.

    All draws are made whatever the switches are: one of them does not shift what another draws.

    Args:
        jitter: each side moves by up to this share of the box's width or height, below 0.5; the image's edges hold.
        dropout: share of boxes left out; one always stays (a sample without layout is what layout dropout is for).
        phrase_dropout: share of boxes that keep their place and lose their phrase.

    Returns:
        layout: the boxes that stay, in their order.
        silent: for each of them, whether its phrase is taken away (a `Box` itself cannot be without one).
    """
    count = len(layout.boxes)
    moves = (2 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 1) * jitter
    chances = torch.rand(count, generator=generator)
    silent = (torch.rand(count, generator=generator) < phrase_dropout).tolist()
    stays = chances >= dropout
    if count and not stays.any():
        stays[chances.argmax()] = True
    boxes, quiet = [], []
    for box, move, stay, empty in zip(layout.boxes, moves.tolist(), stays.tolist(), silent, strict=True):
        if stay:
            boxes.append(_moved(box, move) if jitter else box)
            quiet.append(empty)
    return Layout(caption=layout.caption, boxes=tuple(boxes)), tuple(quiet)


def names_a_side(layout: Layout) -> bool:
    """Whether the caption or a phrase says left or right, so that the mirrored image would belie it."""
    return any(_SIDES.search(text) for text in (layout.caption, *(box.phrase for box in layout.boxes)))


def _moved(box: Box, move: list[float]) -> Box:
    sides = (box.width, box.height) * 2
    left, top, right, bottom = (
        min(max(v + m * side, 0.0), 1.0) for v, m, side in zip(box.xyxy, move, sides, strict=True)
    )
    # Below a jitter of 0.5 only a box as thin as a float's last digit could close.
    return Box((left, top, right, bottom), box.phrase) if left < right and top < bottom else box


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
