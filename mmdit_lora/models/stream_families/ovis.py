"""Ovis-Image: diffusers 0.42.1, transformer_ovis_image.py and pipelines/ovis_image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.models.latents import cartesian_ids, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    (_, _, height, width), embeds = x.shape, texts["embeds"]
    diagonal = torch.arange(embeds.shape[1], device=x.device)
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "encoder_hidden_states": embeds,
        "txt_ids": torch.stack([torch.zeros_like(diagonal), diagonal, diagonal], -1).to(embeds.dtype),
        "img_ids": cartesian_ids(1, height // 2, width // 2, device=x.device).to(embeds.dtype),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Padding is zero, and the base attends to it."""
    embeds, *_ = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, max_sequence_length=max_length)
    return {"embeds": embeds}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    states = captions(pipe, texts, 64)["embeds"]
    return base.masked_mean(states, states.any(-1))


OVIS = StreamFamily(
    name="ovis",
    transformer="OvisImageTransformer2DModel",
    pipelines=("OvisImagePipeline",),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "all"},
    inputs=inputs,
    captions=captions,
    phrases=phrases,
    max_length=256,
    presets={"ovis-image": {}},
)
