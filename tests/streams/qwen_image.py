"""A small Qwen-Image, under true CFG."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from tests.streams.common import qwen_tokenizer, scheduler
from tests.streams.qwen_parts import length, qwen25_vl, qwen_vae

SAMPLING: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": " ", "max_sequence_length": 64}
CHECKPOINTS = ("qwen-image", "qwen-image-edit", "qwen-image-edit-2511")


def transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def pipeline(transformer: Any) -> QwenImagePipeline:
    pipe = QwenImagePipeline(scheduler(), qwen_vae(), qwen25_vl(), qwen_tokenizer(), transformer)
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = length(pipe.tokenizer, before)
    return pipe
