"""FLUX.1 (dev, schnell, Kontext) by the generic stream: diffusers 0.42.1, transformer_flux.py and pipelines/flux.

Beside the CreatiLayout-compatible one of `models/flux.py`. Kontext's reference image follows the generated one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.models.flux import PRESETS
from mmdit_lora.models.latents import cartesian_ids, pack
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:
    (batch, _, height, width), embeds = x.shape, texts["embeds"]
    scale = torch.full((batch,), guidance, device=x.device, dtype=torch.float32)
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "guidance": scale if model.config.guidance_embeds else None,
        "pooled_projections": texts["pooled"],
        "encoder_hidden_states": embeds,
        "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
        "img_ids": cartesian_ids(1, height // 2, width // 2, device=x.device).to(embeds.dtype),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(list(texts), max_sequence_length=max_length)
    return {"embeds": embeds, "pooled": pooled}


FLUX = StreamFamily(
    name="flux",
    transformer="FluxTransformer2DModel",
    pipelines=("FluxPipeline", "FluxKontextPipeline"),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "all"},
    phrase_dim=lambda config: config.pooled_projection_dim,
    text_dim=lambda config: config.joint_attention_dim,
    pooled_dim=lambda config: config.pooled_projection_dim,
    inputs=inputs,
    captions=captions,
    phrases=lambda pipe, texts: pipe._get_clip_prompt_embeds(list(texts)),  # CLIP's pooled one
    presets={**PRESETS, "flux-kontext-dev": PRESETS["flux-dev"]},
)
