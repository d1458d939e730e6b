"""Z-Image (and Turbo): ZImageTransformer2DModel, ZImagePipeline of diffusers 0.42.1.

Samples come as lists, captions each of their own length. A sequence has the image, filled up to a multiple of 32, before the
text. Its time runs from noise to image, and it predicts x0 - noise. Its pipeline's guidance scale is ours - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import Call, StreamFamily


def grid(model: Any, call: Call) -> tuple[int, int]:  # noqa: ARG001
    patch = call.get("patch_size", 2)
    height, width = call["x"][0].shape[-2:]
    return height // patch, width // patch


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    embeds, mask = texts["embeds"], texts.get("mask")
    texts_of = list(embeds) if mask is None else [e[m] for e, m in zip(embeds, mask.bool(), strict=True)]
    return {"x": list(x.unsqueeze(2)), "t": 1 - t, "cap_feats": texts_of}


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, max_sequence_length=max_length)
    masks = [torch.ones(len(each), dtype=torch.bool, device=each.device) for each in embeds]
    return {name: pad_sequence(each, batch_first=True) for name, each in (("embeds", embeds), ("mask", masks))}


Z_IMAGE = StreamFamily(
    name="z_image",
    transformer="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
    blocks={"layers": "head"},
    width=lambda config: config.dim,
    phrase_dim=lambda config: config.cap_feat_dim,
    grid=grid,
    time=lambda call: 1000 * (1 - call["t"]),
    inputs=inputs,
    outputs=lambda samples, height, width: -torch.stack(list(samples)).squeeze(2),  # noqa: ARG005
    captions=captions,
    ragged=True,
    phrases=lambda pipe, texts: base.masked_mean(*captions(pipe, texts, 64).values()),
    guidance="cond_first",
    guide=base.beyond_one,
    channels=lambda config: config.in_channels,
    max_side=lambda config: 2 * min(config.axes_lens[1:]),
    presets={"z-image": {"axes_lens": [1536, 512, 512]}},
)
