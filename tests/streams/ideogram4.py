"""A small Ideogram 4."""

from __future__ import annotations

from typing import Any

from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.streams.common import VOCABULARY, flux2_vae, qwen_tokenizer, scheduler

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "guidance_schedule": None, "max_sequence_length": 128}
CHECKPOINTS = ("ideogram4",)


def transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=13 * 8,
        mrope_section=(4, 2, 2),
    ).eval()


def pipeline(transformer: Any) -> Ideogram4Pipeline:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 36,  # the pipeline reads thirteen of them, up to the last
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 8}
    vision["deepstack_visual_indexes"] = [0]
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content[0].text")
    # Another transformer guides.
    return Ideogram4Pipeline(
        scheduler(), flux2_vae(), encoder, tokenizer, transformer, unconditional_transformer=globals()["transformer"]()
    )
