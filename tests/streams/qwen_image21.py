"""A small Qwen-Image 2.1, under true CFG, with its KV cache."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

from tests.streams.common import scheduler
from tests.streams.qwen_parts import qwen3_vl, qwen3_vl_processor

SAMPLING: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": " "}
CHECKPOINTS = ("qwen-image-2.1",)


def transformer() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def pipeline(transformer: Any) -> QwenImage21Pipeline:
    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.randn(4).tolist(),
        latents_std=(0.5 + torch.rand(4)).tolist(),
    )
    return QwenImage21Pipeline(scheduler(), vae.eval(), qwen3_vl(), qwen3_vl_processor(), transformer)
