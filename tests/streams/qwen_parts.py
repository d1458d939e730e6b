"""What the small pipelines of the Qwen-Image line share: text encoders that read images too, and the VAE of one frame."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.streams.common import SPECIAL, VOCABULARY, qwen_tokenizer

# As the published one for messages whose content is a list.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
SIZES = {
    "vocab_size": VOCABULARY + 1,  # and <|video_pad|>
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 8}


def token(name: str) -> int:
    return 256 + SPECIAL.index(name)


def ids() -> dict[str, int]:
    names = {
        "image_token_id": "image_pad",
        "vision_start_token_id": "vision_start",
        "vision_end_token_id": "vision_end",
    }
    return {key: token(f"<|{name}|>") for key, name in names.items()} | {"video_token_id": VOCABULARY}


def qwen25_vl() -> Any:
    text = {**SIZES, "head_dim": None, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION, **ids())
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl() -> Any:
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids())).eval()


def image_processor(patch: int) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(patch_size=patch, size={"shortest_edge": 32**2, "longest_edge": 512**2})


def qwen25_vl_processor() -> Qwen2_5_VLProcessor:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)
    return Qwen2_5_VLProcessor(image_processor(14), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def qwen3_vl_processor() -> Qwen3VLProcessor:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)
    return Qwen3VLProcessor(image_processor(16), tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=torch.randn(4).tolist(),
        latents_std=(0.5 + torch.rand(4)).tolist(),
    ).eval()


def length(tokenizer: Qwen2TokenizerFast, text: str) -> int:
    """Of a template's part, whose number of tokens the pipelines have as a constant for the published tokenizer."""
    return len(tokenizer(text).input_ids)
