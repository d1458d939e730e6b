"""A small FLUX.1 dev (embedded guidance, and true CFG beside it)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline, FluxTransformer2DModel

from tests.tiny_flux import tiny_flux_pipeline

SAMPLING: dict[str, Any] = {
    "guidance_scale": 3.5,
    "true_cfg_scale": 2.0,
    "negative_prompt": "",
    "max_sequence_length": 24,
}
CHECKPOINTS = ("flux-dev", "flux-schnell", "flux-kontext-dev")


def transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ).eval()


def pipeline(transformer: Any) -> FluxPipeline:
    with tempfile.TemporaryDirectory() as folder:  # of the tokenizer's files, which are read
        parts = {n: part for n, part in tiny_flux_pipeline(Path(folder)).components.items() if n != "transformer"}
    return FluxPipeline(**parts, transformer=transformer)
