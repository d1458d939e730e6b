"""Qwen-Image (2512, Edit): QwenImageTransformer2DModel, QwenImagePipeline of diffusers 0.42.1.

The image that is generated comes first; the images of Edit follow it. The text has a mask where captions differ in length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.models.latents import one_frame_latents, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:
    (batch, _, height, width), mask = x.shape, texts.get("mask")
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "guidance": x.new_full((batch,), guidance) if model.config.guidance_embeds else None,
        "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
        "encoder_hidden_states": texts["embeds"],
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    embeds, mask = pipe.encode_prompt(list(texts), max_sequence_length=max_length)
    if mask is None:  # all tokens are there
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return {"embeds": embeds, "mask": mask}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    return base.masked_mean(*captions(pipe, texts, 1024).values())


QWEN_IMAGE = StreamFamily(
    name="qwen_image",
    transformer="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline", "QwenImageEditPipeline"),
    blocks={"transformer_blocks": "head"},
    grid=lambda _, call: tuple(call["img_shapes"][0][0][1:]),
    inputs=inputs,
    captions=captions,
    ragged=True,
    phrases=phrases,
    guide=base.true_cfg,
    latents=one_frame_latents,
    presets={"qwen-image": {}, "qwen-image-edit": {}, "qwen-image-edit-2511": {"zero_cond_t": True}},
)
