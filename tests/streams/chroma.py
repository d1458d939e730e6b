"""A small Chroma."""

from __future__ import annotations

from typing import Any

from diffusers import ChromaPipeline, ChromaTransformer2DModel

from tests.streams.common import scheduler
from tests.tiny import tiny_vae
from tests.tiny_flux import tiny_t5_encoder, tiny_t5_tokenizer

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 24}
CHECKPOINTS = ("chroma",)


def transformer() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    ).eval()


def pipeline(transformer: Any) -> ChromaPipeline:
    return ChromaPipeline(scheduler(), tiny_vae(), tiny_t5_encoder(), tiny_t5_tokenizer(), transformer)
