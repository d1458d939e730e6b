"""Krea 2 (Raw and Turbo): Krea2Transformer2DModel, Krea2Pipeline of diffusers 0.42.1.

The text, hidden states of several layers of its encoder, comes before the image. Its padding stands between the prompt and the
end of the template, so captions keep the fixed length that the pipeline gives them. Its guidance scale is ours - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmdit_lora.models.latents import cartesian_ids, one_frame_latents, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    embeds, (height, width) = texts["embeds"], x.shape[-2:]
    image_ids = cartesian_ids(1, height // 2, width // 2, device=x.device).float()
    return {
        "hidden_states": pack(x),
        "encoder_hidden_states": embeds,
        "timestep": t,
        "position_ids": F.pad(image_ids, (0, 0, embeds.shape[1], 0)),
        "encoder_attention_mask": texts.get("mask"),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Embeds are (n, S, layers, E)."""
    return dict(zip(("embeds", "mask"), pipe.encode_prompt(list(texts), max_sequence_length=max_length), strict=True))


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    """The mean over tokens and layers."""
    embeds, mask = captions(pipe, texts, 64).values()
    return base.masked_mean(embeds.mean(2), mask)


KREA2 = StreamFamily(
    name="krea2",
    transformer="Krea2Transformer2DModel",
    pipelines=("Krea2Pipeline",),
    blocks={"transformer_blocks": "tail"},
    phrase_dim=lambda config: config.text_hidden_dim,
    text_dim=lambda config: (config.num_text_layers, config.text_hidden_dim),
    grid=lambda _, call: base.grid_of_ids(call["position_ids"][call["encoder_hidden_states"].shape[1] :]),
    inputs=inputs,
    captions=captions,
    phrases=phrases,
    guidance="alternate",
    guide=base.beyond_one,
    latents=one_frame_latents,
    presets={"krea2": {}},
)
