"""Chroma: diffusers 0.42.1, transformer_chroma.py and pipelines/chroma: FLUX.1 without pooled text, with a text mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmdit_lora.models.latents import cartesian_ids, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    (_, _, height, width), embeds = x.shape, texts["embeds"]
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "encoder_hidden_states": embeds,
        "txt_ids": embeds.new_zeros(embeds.shape[1], 3),
        "img_ids": cartesian_ids(1, height // 2, width // 2, device=x.device).to(embeds.dtype),
        "attention_mask": F.pad(texts["mask"].to(embeds.dtype), (0, height * width // 4), value=1.0),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """The mask leaves one token of the padding in, as the base was trained."""
    embeds, _, mask, *_ = pipe.encode_prompt(
        list(texts), do_classifier_free_guidance=False, max_sequence_length=max_length
    )
    return {"embeds": embeds, "mask": mask}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    """The mean over a phrase's own tokens, without that of the padding."""
    encoded = captions(pipe, texts, 64)
    return base.masked_mean(encoded["embeds"], F.pad(encoded["mask"][:, 1:], (0, 1)))


CHROMA = StreamFamily(
    name="chroma",
    transformer="ChromaTransformer2DModel",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "tail"},
    inputs=inputs,
    captions=captions,
    phrases=phrases,
    guidance="alternate",
    masked=True,
    unchecked={"single_transformer_blocks": ("attention_mask",)},
    presets={"chroma": {}},
)
