"""Small pipelines of every family, and diffusers' own with the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusion3Pipeline

from mmdit_lora import Box, Layout
from tests.tiny import plain_twin, tiny_pipeline, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

FAMILIES = ("sd3", "flux")
RED = Layout("a red circle", [Box((0.1, 0.1, 0.4, 0.5), "red circle")])
TWO = Layout("two things", [Box((0.5, 0.5, 0.9, 0.9), "blue square"), Box((0.0, 0.2, 0.3, 0.9), "red circle")])


def open_pipeline(family: str, folder: Path) -> Any:
    """Two blocks (FLUX: and two single ones), its gates open. `folder` takes the tokenizer's files."""
    if family == "sd3":
        pipe: Any = tiny_pipeline(folder, tiny_transformer(num_layers=2, in_channels=16, out_channels=16))
        with torch.random.fork_rng(devices=[]):  # diffusers' inpainting insists on 16 channels
            torch.manual_seed(4)
            pipe.register_modules(vae=AutoencoderKL.from_config({**pipe.vae.config, "latent_channels": 16}).eval())
    else:
        pipe = tiny_flux_pipeline(folder, tiny_flux_transformer(layout_single_blocks=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_of(pipe: Any) -> Any:
    """diffusers' own pipeline with copies of the same weights."""
    components = {name: copy.deepcopy(part) for name, part in pipe.components.items() if name != "transformer"}
    if isinstance(pipe, StableDiffusion3Pipeline):
        stock: Any = StableDiffusion3Pipeline(**components, transformer=plain_twin(pipe.transformer))
    else:
        stock = FluxPipeline(**components, transformer=plain_twin(pipe.transformer))
    stock.set_progress_bar_config(disable=True)
    return stock


def generate(pipe: Any, *args: Any, seeds: int | list[int] = 0, **kwargs: Any) -> np.ndarray:
    """(n, 32, 32, 3) in [0, 1], in a few steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in ([seeds] if isinstance(seeds, int) else seeds)]
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32, "max_sequence_length": 8}
    return pipe(*args, generator=generators if len(generators) > 1 else generators[0], **{**settings, **kwargs}).images


def scales_seen(pipe: Any, *args: Any, **kwargs: Any) -> list[float | None]:
    """The layout scale of every call of the transformer."""
    return [attention.get("layout_scale") for attention in attention_kwargs_seen(pipe, *args, **kwargs)]


def attention_kwargs_seen(pipe: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """What rode in the attention kwargs of every call of the transformer."""
    seen: list[dict[str, Any]] = []
    forward = pipe.transformer.forward

    def spy(*inner: Any, **options: Any) -> Any:
        seen.append(dict(options["joint_attention_kwargs"] or {}))
        return forward(*inner, **options)

    pipe.transformer.forward = spy
    try:
        generate(pipe, *args, **kwargs)
    finally:
        del pipe.transformer.forward
    return seen


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """By more than rounding could explain."""
    return not np.allclose(a, b, atol=5e-3)
