"""A small Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from transformers import Gemma2Config, Gemma2Model

from tests.streams.common import VOCABULARY, kl_vae, qwen_tokenizer, scheduler

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 256}
CHECKPOINTS = ("lumina2",)


def transformer() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 64, 64),
        cap_feat_dim=8,
    ).eval()


def pipeline(transformer: Any) -> Lumina2Pipeline:
    encoder = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=qwen_tokenizer().eos_token_id,
    )
    return Lumina2Pipeline(transformer, scheduler(), kl_vae(), Gemma2Model(encoder).eval(), qwen_tokenizer())
