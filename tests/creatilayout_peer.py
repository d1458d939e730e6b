"""CreatiLayout's own classes, from a checkout under `$MMDIT_LORA_PEERS/CreatiLayout`, loaded with `creatilayout_files`."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mmdit_lora.models import LayoutInputs
from tests.creatilayout_files import CONFIGS, RANK, filled, inputs, plain_base, stream_shapes
from tests.tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer
from tests.tiny_flux import tiny_flux_pipeline, tiny_t5_encoder

BOXES, SCALES = (1, 3, 10), (1.0, 0.3)
STEPS, WINDOW, GUIDANCE = 10, (0.0, 0.3), 7.0
PHRASES = ["a red circle", "blue"]
CORNERS = [(0.1, 0.2, 0.5, 0.9), (0.4, 0.0, 1.0, 0.3)]


def checkout() -> Path | None:
    """The peer's folder; None where there is none."""
    folder = Path(os.environ.get("MMDIT_LORA_PEERS", "")) / "CreatiLayout"
    return folder if (folder / "src" / "models").is_dir() else None


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Its modules are called `src...`."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def peer_model(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """Its transformer class at tiny size, every tensor of it loaded from the files of `creatilayout_files`."""
    folder = checkout()
    assert folder is not None
    with importable(folder):
        if variant == "flux":
            module = importlib.import_module("src.models.transformer_flux_SiamLayout")
            blocks = {"double_blocks_index": [0, 1], "single_blocks_index": [0, 1]}
            model = module.FluxTransformer2DModel(**CONFIGS[variant], attention_type="layout", **blocks)
        else:
            suffix = "_lora" if variant == "sd3-lora" else ""
            module = importlib.import_module(f"src.models.transformer_sd3_SiamLayout{suffix}")
            if suffix:  # the rank is the default of a constructor that its model does not hand on
                block = module.SiamLayoutLoRAJointTransformerBlock
                block = getattr(block, "func", block)
                module.SiamLayoutLoRAJointTransformerBlock = functools.partial(block, rank=RANK, network_alpha=RANK)
            model = module.SiamLayoutSD3Transformer2DModel(**CONFIGS[variant])
    base = plain_base(variant).to(dtype).state_dict()
    model.to(dtype).load_state_dict(filled(stream_shapes(variant), dtype) | base, strict=True)
    return model.eval()


@torch.no_grad()
def peer_velocity(model: Any, variant: str, layout: LayoutInputs, scale: float, dtype: torch.dtype) -> Tensor:
    """What it predicts for `creatilayout_files.inputs`."""
    phrases = layout.phrase_embeds
    if variant == "flux":  # it cuts 77 tokens to 30 itself
        phrases = torch.cat([phrases, phrases.new_zeros(*phrases.shape[:2], 47, phrases.shape[-1])], dim=2)
    given = {
        "boxes": layout.boxes.to(dtype),
        "positive_embeddings": phrases,
        "bbox_masks" if variant == "flux" else "masks": layout.mask.to(dtype),
    }
    return model(**inputs(variant, dtype), layout_kwargs={"layout": given}, bbox_scale=scale).sample


def loop_components(variant: str, folder: Path) -> dict[str, Any]:
    """All that both pipelines of a family are made of, but the transformer; phrases are as wide as the peer has them."""

    def with_numbers(encoder: torch.nn.Module) -> torch.nn.Module:
        encoder.load_state_dict(filled({n: tuple(p.shape) for n, p in encoder.named_parameters()}), strict=False)
        return encoder.eval()

    if variant == "flux":
        parts = dict(tiny_flux_pipeline(folder).components)
        parts["text_encoder_2"] = with_numbers(tiny_t5_encoder(4096))
    else:
        parts = dict(tiny_pipeline(folder).components)
        for name, width in (("text_encoder", 768), ("text_encoder_2", 1280)):
            parts[name] = with_numbers(tiny_text_encoder(projection_dim=width))
        parts |= {"tokenizer": tiny_tokenizer(folder), "tokenizer_2": tiny_tokenizer(folder)}
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {key: value for key, value in parts.items() if key != "transformer"}


def loop_arguments(variant: str) -> dict[str, Any]:
    """Encoded texts, with and without, and the first noise: the arguments that both pipelines share.

    FLUX has the guidance that is embedded and, by a second call a step, the true one.
    """
    config = CONFIGS[variant]
    generator = torch.Generator().manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    text, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    own = {"guidance_scale": 3.5, "true_cfg_scale": 3.0} if variant == "flux" else {"guidance_scale": GUIDANCE}
    return {
        "prompt_embeds": normal(1, 7, text),
        "negative_prompt_embeds": normal(1, 7, text),
        "pooled_prompt_embeds": normal(1, pooled),
        "negative_pooled_prompt_embeds": normal(1, pooled),
        "latents": normal(1, 64, 16) if variant == "flux" else normal(1, 4, 16, 16),
        "num_inference_steps": STEPS,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        **own,
    }


def peer_loop(variant: str, tokenizers: Path) -> Tensor:
    """The latents that its pipeline ends with."""
    folder = checkout()
    assert folder is not None
    file, family = {"sd3": ("sd3", "SD3"), "flux": ("flux", "Flux")}[variant]
    with importable(folder):
        module = importlib.import_module(f"src.pipeline.pipeline_{file}_CreatiLayout")
    pipeline = getattr(module, f"CreatiLayout{family}Pipeline")
    parts = loop_components(variant, tokenizers)
    known = pipeline._get_signature_keys(pipeline)[0]
    pipe = pipeline(transformer=peer_model(variant), **{key: value for key, value in parts.items() if key in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe(**loop_arguments(variant), bbox_phrases=PHRASES, bbox_raw=CORNERS).images
