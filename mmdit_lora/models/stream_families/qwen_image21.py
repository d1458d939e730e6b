"""Qwen-Image 2.1: QwenImage21Transformer2DModel, QwenImage21Pipeline of diffusers 0.42.1.

The image that is generated comes last, behind text and condition images, which are modulated at t = 0 and do not attend to it;
so it is the tail of the sequence also where they come from the KV cache. The VAE reads and paints an alpha channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit_lora.models.latents import one_frame_latents
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    (batch, _, height, width), embeds, mask = x.shape, texts["embeds"], texts.get("mask")
    return {
        "hidden_states": x.flatten(2).transpose(1, 2),
        "timestep": t,
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": None if mask is None or mask.all() else mask,
        "img_shapes": [[(1, height, width)]] * batch,
        # The text encoder's place of an image stands for 2 x 2 of its tokens.
        "img_mask": F.pad(torch.zeros_like(embeds[..., 0], dtype=torch.bool), (0, height * width // 4), value=True),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int = 0) -> dict[str, Tensor]:  # noqa: ARG001
    """Whole captions: the pipeline cuts none."""
    embeds, mask, _ = pipe.encode_prompt(list(texts))
    if mask is None:  # all tokens are there
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return {"embeds": embeds, "mask": mask}


QWEN_IMAGE21 = StreamFamily(
    name="qwen_image21",
    transformer="QwenImage21Transformer2DModel",
    pipelines=("QwenImage21Pipeline",),
    blocks={"transformer_blocks": "tail"},
    phrase_dim=lambda config: config.context_in_dim,
    grid=lambda _, call: tuple(call["img_shapes"][0][-1][1:]),
    inputs=inputs,
    outputs=lambda sample, height, width: sample[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)),
    captions=captions,
    ragged=True,
    phrases=lambda pipe, texts: base.masked_mean(*captions(pipe, texts).values()),
    guide=base.true_cfg,
    latents=lambda vae, pixels: one_frame_latents(vae, F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)),
    channels=lambda config: config.in_channels,
    vae_scale_factor=16,
    presets={"qwen-image-2.1": {}},
)
