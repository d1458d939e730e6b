"""Against forgetting: images of the old domain that the base itself generates, on which the adapter must not change it.

DreamBooth's prior preservation (Ruiz et al. 2022, arXiv 2208.12242) replays images that the base generated. Here their target
is not the noise that was added but what the base itself predicts, as in learning without forgetting (Li and Hoiem 2016,
arXiv 1606.09282): the loss is 0 as long as nothing changes, and no sample noise pulls at the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_lora.config.loading import Config
from mmdit_lora.data.records import METADATA
from mmdit_lora.data.sources import open_layouts
from mmdit_lora.errors import InputError
from mmdit_lora.files import json_text, write_text
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate
from mmdit_lora.pipelines.sampling import quiet_texts
from mmdit_lora.training.loss import Batch, Objective, flow_matching_loss, predict
from mmdit_lora.visual import save_png

FOLDER = "prior"


def prior_layouts(config: Config) -> list[Layout]:
    """The layouts of `prior.layouts`: a data set folder, whose images are not read, or a file of layouts.

    Raises:
        InputError: it holds none, or the method trains no adapter that could be switched off.
    """
    path, location = config.prior.layouts, "prior.layouts"
    if path is None:
        return []
    if config.method != "lora":
        raise InputError(
            f"is given with method {config.method}: what the base predicts is known only while it stays as it is",
            location=location,
            hint="set it to null, or train with method lora",
        )
    boxed = [layout for layout in open_layouts(path) if layout.boxes]
    if not boxed:
        raise InputError(f"{path} holds no layout with a box", location=location, hint="give layouts of the old domain")
    return boxed[: config.prior.count]


def generate_prior(
    pipe: LayoutPipeline, layouts: list[Layout], folder: Path, settings: SamplingConfig, *, seed: int
) -> None:
    """Generate images of the layouts by the base as it is, into a data set folder; those of a killed run are kept.

    Args:
        folder: is written to; `metadata.jsonl` comes last.
        settings: how the run samples.
        seed: of the first image; image number i has `seed + i`.
    """
    lines: list[dict[str, Any]] = [
        {
            "file_name": f"{number:06d}.png",
            "caption": layout.caption,
            "objects": {"bbox": [list(b.xyxy) for b in layout.boxes], "phrase": [b.phrase for b in layout.boxes]},
        }
        for number, layout in enumerate(layouts)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with without_adapter(pipe.transformer), torch.no_grad(), quiet_texts(pipe):
        # By batches that are always the same: the last bits of an image depend on the others of its batch.
        for start in range(0, len(layouts), settings.batch_size):
            names = [line["file_name"] for line in lines[start : start + settings.batch_size]]
            if all((folder / name).is_file() for name in names):
                continue
            part = layouts[start : start + settings.batch_size]
            for name, image in zip(names, generate(pipe, part, settings, seed=seed + start), strict=True):
                save_png(image, folder / name)
    text = "".join(json_text(line) + "\n" for line in lines)
    write_text(folder / METADATA, text)


def prior_losses(model: nn.Module, bare_model: Any, batch: Batch, objective: Objective) -> Tensor:
    """How far the adapter moves the base's own predictions, (B,) fp32; as `flow_matching_loss`, with these for a target.

    Args:
        model: with its adapter, in Accelerate's wrapper or not. bare_model: the same without.
    """
    with torch.no_grad(), without_adapter(bare_model):
        target = predict(bare_model, batch, guidance=objective.guidance)
    return flow_matching_loss(model, batch, objective, target=target.float())


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base alone; then its adapter again, training as before."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
