"""A small Z-Image."""

from __future__ import annotations

from typing import Any

from diffusers import ZImagePipeline, ZImageTransformer2DModel

from tests.streams.common import kl_vae, qwen3, qwen_tokenizer, scheduler

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 64}
CHECKPOINTS = ("z-image",)


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    ).eval()


def pipeline(transformer: Any) -> ZImagePipeline:
    return ZImagePipeline(scheduler(), kl_vae(), qwen3(head=False), qwen_tokenizer(), transformer)
