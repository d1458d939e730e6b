"""A small LongCat-Image. Its pipeline insists on 16 latent channels."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, LongCatImagePipeline, LongCatImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.streams.common import VOCABULARY, qwen_tokenizer, scheduler
from tests.tiny import tiny_vae

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "enable_prompt_rewrite": False}
CHECKPOINTS = ("longcat-image",)


def transformer() -> LongCatImageTransformer2DModel:
    return LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    ).eval()


def pipeline(transformer: Any) -> LongCatImagePipeline:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    vae = AutoencoderKL.from_config({**tiny_vae().config, "latent_channels": 16}).eval()
    # The processor serves the rewriting of prompts alone.
    pipe = LongCatImagePipeline(scheduler(), vae, encoder, qwen_tokenizer(), None, transformer)
    pipe.tokenizer_max_length = 48
    return pipe
