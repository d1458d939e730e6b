"""How images are sampled, in one value; it is checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from mmdit_lora.config.ranges import BATCH, GUIDANCE, LAYOUT_SCALE, SIDE, STEPS, check_window


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled.

    Args:
        steps: sampling steps; guidance_scale: by the caption, 1 = off (embedded, where a base is guidance-distilled).
            None = what the base states.
        layout_scale, layout_window: see `LayoutPipeline`.
        size: (height, width) in pixels, where a call gives none an image; None = the base's own.
        batch_size: images at a time; it changes the images by rounding only.

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
