"""SD3 and SD3.5 by the generic stream, beside the CreatiLayout-compatible one of `models/sd3.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.models.sd3 import PRESETS
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    return {
        "hidden_states": x,
        "encoder_hidden_states": texts["embeds"],
        "pooled_projections": texts["pooled"],
        "timestep": 1000 * t,
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(texts), None, None, do_classifier_free_guidance=False, max_sequence_length=max_length
    )
    return {"embeds": embeds, "pooled": pooled}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    """Pooled CLIP-L beside pooled CLIP-G embeddings."""
    return torch.cat([pipe._get_clip_prompt_embeds(list(texts), clip_model_index=n)[1] for n in (0, 1)], dim=-1)


SD3 = StreamFamily(
    name="sd3",
    transformer="SD3Transformer2DModel",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    blocks={"transformer_blocks": "all"},
    phrase_dim=lambda config: config.pooled_projection_dim,
    text_dim=lambda config: config.joint_attention_dim,
    pooled_dim=lambda config: config.pooled_projection_dim,
    grid=lambda model, call: tuple(side // model.config.patch_size for side in call["hidden_states"].shape[-2:]),
    time=lambda call: call["timestep"],
    inputs=inputs,
    outputs=lambda sample, height, width: sample,  # noqa: ARG005
    captions=captions,
    phrases=phrases,
    guidance="uncond_first",
    channels=lambda config: config.in_channels,
    max_side=lambda config: config.pos_embed_max_size * config.patch_size,
    max_length=256,
    presets=PRESETS,
)
