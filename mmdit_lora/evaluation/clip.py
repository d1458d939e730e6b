"""CLIP scores of images and boxes, and the distance of images to the data set's, if CLIP's weights are given.

CLIP score: 100 x cosine, at least 0 (Hessel et al., arXiv 2104.08718, as torchmetrics has it), of an image with its caption
and of each box's crop with its phrase. Distances to the data set's own images are of CLIP's image features, which see more
than Inception's (Jayasumana et al., arXiv 2401.09603) and whose weights exist as safetensors: KID (Binkowski et al., arXiv
1801.01401), by torchmetrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.base import TransformersModel
from mmdit_lora.evaluation.detectors.judge import crops
from mmdit_lora.evaluation.intervals import Table
from mmdit_lora.layout import Layout

EXAMPLE = "openai/clip-vit-large-patch14"
MIN_IMAGES = 50  # for a distance


class Clip(TransformersModel):
    """A CLIP model of transformers, by folder or hub id.

    Raises:
        InputError: no weights, or no torchmetrics; the message says how to get them.
    """

    def __init__(self, source: str, *, device: str | None = None, batch_size: int = 32) -> None:
        if find_spec("torchmetrics") is None:
            hint = "uv sync --extra eval, or pip install torchmetrics"
            raise InputError("needs torchmetrics", location="--clip", hint=hint)
        super().__init__(transformers.CLIPModel, source, spec=f"clip:{source}", example=EXAMPLE, device=device)
        self.name, self.batch_size = source, batch_size

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> tuple[dict[str, Table], Tensor]:
        """Sums of `clip_score` and `clip_box` (images, 2), see `metrics.metric_sums`, and features (images, D) of unit length."""
        features = self.image_features(images)
        scores = _score(features, self.text_features([layout.caption for layout in layouts]))
        has_caption = np.array([bool(layout.caption) for layout in layouts])
        parts = [crop for image, layout in zip(images, layouts, strict=True) for crop in crops(image, layout)]
        phrases = [box.phrase for layout in layouts for box in layout.boxes]
        box_scores = _score(self.image_features(parts), self.text_features(phrases)) if parts else np.zeros(0)
        ends = np.cumsum([len(layout.boxes) for layout in layouts])
        boxes = [(part.sum(), len(part)) for part in np.split(box_scores, ends[:-1])]
        tables = {
            "clip_score": np.stack([scores * has_caption, has_caption], axis=1),
            "clip_box": np.array(boxes, dtype=np.float64).reshape(-1, 2),
        }
        return tables, features.cpu()

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, D) features of unit length."""
        out = []
        for start in range(0, len(images), self.batch_size):
            batch = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            inputs = self.processor(images=batch, return_tensors="pt").to(self.device)
            pooled = self.model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            out.append(self.model.visual_projection(pooled))
        return torch.nn.functional.normalize(torch.cat(out).float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, D) features of unit length; what is longer than the model takes is cut."""
        distinct = list(dict.fromkeys(texts))
        out = []
        for start in range(0, len(distinct), 4 * self.batch_size):
            batch = distinct[start : start + 4 * self.batch_size]
            inputs = self.processor(text=batch, return_tensors="pt", padding=True, truncation=True).to(self.device)
            pooled = self.model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            out.append(self.model.text_projection(pooled.pooler_output))
        features = torch.nn.functional.normalize(torch.cat(out).float(), dim=-1)
        return features[[distinct.index(text) for text in texts]]


def _score(images: Tensor, texts: Tensor) -> Table:
    return np.asarray((100 * (images * texts).sum(-1)).clamp(min=0).double().cpu())


def kid(features: Tensor, truth: Tensor) -> float | None:
    """Kernel distance (unbiased, cubic kernel) of images' features (n, D) to the data set's; None for fewer than
    `MIN_IMAGES`.

    KID draws subsets for its spread; over all images it is the same estimate.
    """
    size = min(len(features), len(truth))
    if size < MIN_IMAGES:
        return None
    from torchmetrics.image.kid import poly_mmd  # an optional dependency

    return float(poly_mmd(truth[:size].double(), features[:size].double()))


def spread(images: Sequence[Sequence[Image.Image]]) -> float:
    """How different images of one layout from different noise are: root mean squared difference of their pixels in [0, 1],
    mean over pairs and layouts.

    Args:
        images: for each noise, one image per layout.
    """
    arrays = [np.stack([np.asarray(p.convert("RGB"), dtype=np.float64) / 255 for p in each]) for each in images]
    pairs = [
        np.sqrt(((arrays[a] - arrays[b]) ** 2).mean(axis=(1, 2, 3))).mean()
        for a in range(len(arrays))
        for b in range(a)
    ]
    return float(np.mean(pairs))
