"""Lumina-Image 2.0: Lumina2Transformer2DModel, Lumina2Pipeline of diffusers 0.42.1.

Image tokens follow each sample's own text, shorter sequences are filled up behind. Its time runs from noise to image, and it
predicts x0 - noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.models.stream_families.base import Call, StreamFamily, masked_mean


def grid(model: Any, call: Call) -> tuple[int, int]:
    height, width = call["hidden_states"].shape[-2:]
    return height // model.config.patch_size, width // model.config.patch_size


def index(model: Any, call: Call) -> Tensor:
    height, width = grid(model, call)
    start = call["encoder_attention_mask"].sum(1, keepdim=True)
    return start + torch.arange(height * width, device=start.device)


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    embeds, mask = texts["embeds"], texts.get("mask")
    mask = torch.ones_like(embeds[..., 0], dtype=torch.long) if mask is None else mask
    return {"hidden_states": x, "timestep": 1 - t, "encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    plain = {"do_classifier_free_guidance": False, "max_sequence_length": max_length}
    return dict(zip(("embeds", "mask"), pipe.encode_prompt(list(texts), **plain), strict=False))


LUMINA2 = StreamFamily(
    name="lumina2",
    transformer="Lumina2Transformer2DModel",
    pipelines=("Lumina2Pipeline",),
    blocks={"layers": "index"},
    width=lambda config: config.hidden_size,
    phrase_dim=lambda config: config.cap_feat_dim,
    grid=grid,
    time=lambda call: 1000 * (1 - call["timestep"]),
    inputs=inputs,
    outputs=lambda sample, height, width: -sample,  # noqa: ARG005
    captions=captions,
    phrases=lambda pipe, texts: masked_mean(*pipe._get_gemma_prompt_embeds(list(texts), max_sequence_length=64)),
    guidance="alternate",
    index=index,
    channels=lambda config: config.in_channels,
    max_side=lambda config: config.patch_size * min(config.axes_lens[1:]),
    max_length=256,
    presets={"lumina2": {"cap_feat_dim": 2304}},
)
