"""A small Ovis-Image."""

from __future__ import annotations

from typing import Any

from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

from tests.streams.common import qwen3, qwen_tokenizer, scheduler
from tests.tiny import tiny_vae

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 48}
CHECKPOINTS = ("ovis-image",)


def transformer() -> OvisImageTransformer2DModel:
    return OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=None,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def pipeline(transformer: Any) -> OvisImagePipeline:
    pipe = OvisImagePipeline(scheduler(), tiny_vae(), qwen3(width=16, head=False), qwen_tokenizer(), transformer)
    pipe.system_prompt = "Describe the image by:"  # with a token a byte, 28 tokens as the published one
    return pipe
