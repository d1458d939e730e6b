"""Many layouts to many images: batches, a seed for each image, the settings in one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmdit_lora.config.ranges import BATCH, GUIDANCE, LAYOUT_SCALE, SIDE, STEPS, check_window
from mmdit_lora.errors import NonFiniteError
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines.base import LayoutPipeline


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled.

    Args:
        steps: sampling steps; guidance_scale: by the caption, 1 = off (embedded, where a base is guidance-distilled).
            None = what the base states.
        layout_scale, layout_window: see `LayoutPipeline`.
        size: (height, width) in pixels, where a call gives none an image; None = the base's own.
        batch_size: images at a time; does not change what is painted beyond rounding.

    Raises:
        InputError: a number is outside its range (`mmdit_lora.config.ranges`), or the window is empty.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    layout_scale: float = 1.0
    layout_window: tuple[float, float] = (0.0, 1.0)
    size: tuple[int, int] | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        limits = {"steps": STEPS, "guidance_scale": GUIDANCE, "layout_scale": LAYOUT_SCALE, "batch_size": BATCH}
        for name, within in limits.items():
            if (value := getattr(self, name)) is not None:
                within.check(value, name)
        for side in self.size or ():
            SIDE.check(side, "size")
        check_window(self.layout_window)


def generate(
    pipe: LayoutPipeline,
    layouts: Sequence[Layout],
    settings: SamplingConfig,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    same_noise: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One RGB image for each layout. Image number i starts from the noise of `seed + i`, whatever the batch.

    Args:
        sizes: (height, width) in pixels of each image; None = all as `settings` has it.
        same_noise: all images start from the noise of `seed`, to compare layouts.
        on_progress: called with the number of images done.

    Raises:
        InputError: the base cannot paint a size, or the window covers no step.
        NonFiniteError: images hold NaN or infinity; the batches behind them are not painted any more.
    """
    of_size: dict[tuple[int, int] | None, list[int]] = {}
    for number, size in enumerate(sizes if sizes is not None else [settings.size] * len(layouts)):
        of_size.setdefault(size, []).append(number)
    for size in of_size:
        for side in size or ():
            pipe.check_side(side)
    images: dict[int, Image.Image] = {}
    for size, numbers in of_size.items():
        height, width = size or (None, None)
        for start in range(0, len(numbers), settings.batch_size):
            part = numbers[start : start + settings.batch_size]
            # On the CPU, so that the same seed is the same noise on every device.
            generators = [torch.Generator().manual_seed(seed + (0 if same_noise else number)) for number in part]
            try:
                output: Any = pipe(
                    [layouts[number] for number in part],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    layout_scale=settings.layout_scale,
                    layout_window=settings.layout_window,
                    height=height,
                    width=width,
                    generator=generators,
                )
            except NonFiniteError as error:
                done = len(images) + len(part)
                bad = [part[number] for number in error.bad]
                raise error.change(bad=bad, count=done, left=len(layouts) - done) from None
            images.update(zip(part, output.images, strict=True))
            if on_progress is not None:
                on_progress(len(images))
    return [images[number] for number in range(len(layouts))]
