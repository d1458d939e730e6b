"""Does CLIP find the text in the image, and are images like those of the data set? Where CLIP's weights are given.

CLIP score: 100 x cosine, at least 0 (Hessel et al., arXiv 2104.08718, as torchmetrics has it), of a whole image with its
caption and of each box's crop with its phrase. Distances to the data set's own images are of CLIP's image features, which
see more than Inception's (Jayasumana et al., arXiv 2401.09603) and whose weights exist as safetensors: KID (Binkowski et al.,
arXiv 1801.01401), by torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.common import (
    default_device,
    digest_of_files,
    folder_files,
    load_whole,
    model_folder,
)
from mmdit_lora.evaluation.detectors.judge import crops
from mmdit_lora.evaluation.metrics import Table
from mmdit_lora.layout import Layout

EXAMPLE = "openai/clip-vit-large-patch14"
FEWEST = 50  # images that a distance is told for


class Clip:
    """A CLIP model of transformers, by folder or hub id.

    Raises:
        InputError: no weights, or no torchmetrics; the message says how to get them.
    """

    def __init__(self, source: str, *, device: str | None = None, batch_size: int = 32) -> None:
        from transformers import AutoProcessor, CLIPModel

        if find_spec("torchmetrics") is None:
            raise InputError(
                "needs torchmetrics", location="--clip", hint="uv sync --extra eval, or pip install torchmetrics"
            )
        spec = f"clip:{source}"
        folder = model_folder(source, spec=spec, example=EXAMPLE)
        self.name, self.batch_size, self.device = source, batch_size, default_device(device)
        self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.model: Any = load_whole(CLIPModel.from_pretrained, folder, spec=spec).to(self.device)
        self.files = digest_of_files(*folder_files(folder))

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> tuple[dict[str, Table], Tensor]:
        """Sums of `clip_score` and `clip_box` (images, 2), see `judged.sums`, and features (images, D) of unit length."""
        features = self.images(images)
        whole = self._score(features, self.texts([layout.caption for layout in layouts]))
        parts = [crop for p, layout in zip(images, layouts, strict=True) for crop in crops(p, layout)]
        phrases = [box.phrase for layout in layouts for box in layout.boxes]
        each = self._score(self.images(parts), self.texts(phrases)) if parts else np.zeros(0)
        ends = np.cumsum([len(layout.boxes) for layout in layouts])
        boxes = [(part.sum(), len(part)) for part in np.split(each, ends[:-1])]
        tables = {
            "clip_score": np.stack([whole, np.array([bool(layout.caption) for layout in layouts])], axis=1),
            "clip_box": np.array(boxes, dtype=np.float64).reshape(-1, 2),
        }
        tables["clip_score"][:, 0] *= tables["clip_score"][:, 1]  # no caption: nothing to score
        return tables, features.cpu()

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) features of unit length."""
        out = []
        for start in range(0, len(images), self.batch_size):
            batch = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            seen = self.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            out.append(self.model.visual_projection(seen))
        return torch.nn.functional.normalize(torch.cat(out).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) features of unit length; what is longer than the model takes is cut."""
        distinct = list(dict.fromkeys(texts))
        out = []
        for start in range(0, len(distinct), 4 * self.batch_size):
            batch = distinct[start : start + 4 * self.batch_size]
            inputs = self.processor(text=batch, return_tensors="pt", padding=True, truncation=True).to(self.device)
            read = self.model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            out.append(self.model.text_projection(read.pooler_output))
        found = torch.nn.functional.normalize(torch.cat(out).float(), dim=-1)
        return found[[distinct.index(text) for text in texts]]

    @staticmethod
    def _score(images: Tensor, texts: Tensor) -> Table:
        return np.asarray((100 * (images * texts).sum(-1)).clamp(min=0).double().cpu())


def kid(features: Tensor, truth: Tensor) -> float | None:
    """Kernel distance (unbiased, cubic kernel) of images' features (n, D) to the data set's; None for fewer than `FEWEST`.

    KID draws subsets for its spread; over all images it is the same estimate.
    """
    if min(len(features), len(truth)) < FEWEST:
        return None
    from torchmetrics.image.kid import poly_mmd

    size = min(len(features), len(truth))
    return float(poly_mmd(truth[:size].double(), features[:size].double()))


def spread(images: Sequence[Sequence[Image.Image]]) -> float:
    """How different images of one layout from different noise are: root mean squared difference of their pixels in [0, 1],
    mean over pairs and layouts.

    Args:
        images: for each noise, one image a layout.
    """
    arrays = [np.stack([np.asarray(p.convert("RGB"), dtype=np.float64) / 255 for p in each]) for each in images]
    pairs = [
        np.sqrt(((arrays[a] - arrays[b]) ** 2).mean(axis=(1, 2, 3))).mean()
        for a in range(len(arrays))
        for b in range(a)
    ]
    return float(np.mean(pairs))
