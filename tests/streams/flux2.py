"""A small FLUX.2 klein (base: true CFG)."""

from __future__ import annotations

from typing import Any

from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from tests.streams.common import flux2_vae, qwen3, qwen_tokenizer, scheduler

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 48}
CHECKPOINTS = ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev")


def transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def pipeline(transformer: Any) -> Flux2KleinPipeline:
    # The pipeline reads the hidden states behind the 9th, 18th and 27th layer.
    return Flux2KleinPipeline(scheduler(), flux2_vae(), qwen3(layers=27), qwen_tokenizer(), transformer)
