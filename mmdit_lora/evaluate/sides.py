"""Is the layout obeyed? The base and the base with its adapter, on the same layouts and noise, with ceiling and floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmdit_lora.data.records import Record
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import InputError
from mmdit_lora.evaluate.reader import BoxReading, per_picture, readable, summarise
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, PaintSettings, paint

BOX_GROUPS = ((1, 4), (5, 10))  # numbers of boxes a picture that are also reported apart


@dataclass(frozen=True)
class Side:
    """Pictures of one kind, and how each of their boxes was met."""

    pictures: list[Image.Image]
    readings: list[list[BoxReading]]

    @property
    def fidelity(self) -> dict[str, float]:
        return _fidelity(self.readings)

    @property
    def picture_ious(self) -> list[float]:
        """Mean IoU of each picture, over its boxes; NaN where it has none."""
        return [float(np.mean([box.iou for box in boxes])) if boxes else float("nan") for boxes in self.readings]


@dataclass(frozen=True)
class Evaluation:
    """Sides by name, all on `layouts`: `base`, with an adapter `adapter`, `ground_truth` (the data set's own pictures
    through the VAE: the ceiling), `shuffled` (those against the layouts of others: the floor)."""

    layouts: list[Layout]
    sides: dict[str, Side]
    settings: PaintSettings
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds."""
        report: dict[str, Any] = {name: side.fidelity for name, side in self.sides.items()}
        report["by_boxes"] = {}
        for low, high in BOX_GROUPS:
            rows = [row for row, layout in enumerate(self.layouts) if low <= len(layout.boxes) <= high]
            if rows:
                report["by_boxes"][f"{low}-{high}"] = {
                    "pictures": len(rows),
                    **{name: _fidelity([side.readings[row] for row in rows]) for name, side in self.sides.items()},
                }
        return report | {"pictures": len(self.layouts), "seed": self.seed, "settings": asdict(self.settings)}


def evaluate(
    pipe: LayoutPipeline,
    records: Sequence[Record],
    settings: PaintSettings,
    *,
    seed: int = 0,
    on_progress: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Paint the records' layouts and read the pictures back.

    Args:
        pipe: an active adapter on its transformer becomes the side `adapter`, and is off for `base`.
        on_progress: called with the side and the number of its pictures that are done.

    Raises:
        InputError: the phrases are not those of procedural scenes, which is what the exact reader reads.
    """
    if not readable([record.layout for record in records]):
        raise InputError(
            "holds phrases that the exact reader does not know; it reads procedural scenes only",
            where=records[0].where if records else None,
            cure="for photographs, compare the held-out denoising loss that `train` writes into report.json",
        )
    size = settings.size or (pipe.default_side,) * 2
    prepared = [prepare(record.load(), record.layout, size) for record in records]
    layouts = [layout for _, layout in prepared]
    truth = through_vae(pipe, [pixels for pixels, _ in prepared], batch_size=settings.batch_size)

    def painted(name: str) -> Side:
        tell = None if on_progress is None else lambda done: on_progress(name, done)
        pictures = paint(pipe, layouts, settings, seed=seed, on_progress=tell)
        return Side(pictures, per_picture(pictures, layouts))

    transformer = pipe.transformer
    sides = {}
    if getattr(transformer, "peft_config", None):
        transformer.disable_lora()
        try:
            sides["base"] = painted("base")
        finally:
            transformer.enable_lora()
        sides["adapter"] = painted("adapter")
    else:
        sides["base"] = painted("base")
    sides["ground_truth"] = Side(truth, per_picture(truth, layouts))
    sides["shuffled"] = Side(truth, per_picture(truth, layouts[1:] + layouts[:1]))
    return Evaluation(layouts, sides, settings, seed)


@torch.no_grad()
def through_vae(pipe: LayoutPipeline, pixels: Sequence[torch.Tensor], *, batch_size: int) -> list[Image.Image]:
    """(3, H, W) pictures in [-1, 1], encoded and decoded: the best that this base could paint."""
    out: list[Image.Image] = []
    for start in range(0, len(pixels), batch_size):
        x = torch.stack(list(pixels[start : start + batch_size])).to(pipe.vae.device, pipe.vae.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        out += pipe.image_processor.postprocess(decoded.float(), output_type="pil")
    return out


def _fidelity(readings: Sequence[list[BoxReading]]) -> dict[str, float]:
    return dict(summarise([box for boxes in readings for box in boxes]).to_dict())
