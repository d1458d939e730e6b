"""A small Krea 2 Raw."""

from __future__ import annotations

from typing import Any

from diffusers import Krea2Pipeline, Krea2Transformer2DModel

from tests.streams.common import qwen_tokenizer, scheduler
from tests.streams.qwen_parts import length, qwen3_vl, qwen_vae

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 64}
CHECKPOINTS = ("krea2",)


def transformer() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=8,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def pipeline(transformer: Any) -> Krea2Pipeline:
    pipe = Krea2Pipeline(
        scheduler(), qwen_vae(), qwen3_vl().model, qwen_tokenizer(), transformer, text_encoder_select_layers=(1, 2)
    )
    pipe.prompt_template_encode_start_idx = length(pipe.tokenizer, pipe.prompt_template_encode_prefix)
    pipe.prompt_template_encode_num_suffix_tokens = length(pipe.tokenizer, pipe.prompt_template_encode_suffix)
    return pipe
