"""FLUX.2 (dev, klein 4B and 9B): diffusers 0.42.1, models/transformers/transformer_flux2.py and pipelines/flux2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmdit_lora.models.latents import batch_norm_latents, cartesian_ids, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def config(text: int, double: int, single: int, heads: int, *, guidance: bool = False) -> dict[str, Any]:
    sizes = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    return {"joint_attention_dim": text, "guidance_embeds": guidance, **sizes}


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:
    (batch, _, height, width), embeds = x.shape, texts["embeds"]
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "guidance": x.new_full((batch,), guidance) if model.config.guidance_embeds else None,
        "encoder_hidden_states": embeds,
        "txt_ids": cartesian_ids(1, 1, 1, embeds.shape[1], device=x.device).expand(batch, -1, -1),
        "img_ids": cartesian_ids(1, height // 2, width // 2, 1, device=x.device).expand(batch, -1, -1),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    layers = pipe.config.get("text_encoder_out_layers")
    chosen = {} if layers is None else {"text_encoder_out_layers": tuple(layers)}
    return {"embeds": pipe.encode_prompt(list(texts), max_sequence_length=max_length, **chosen)[0]}


FLUX2 = StreamFamily(
    name="flux2",
    transformer="Flux2Transformer2DModel",
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline", "Flux2KleinInpaintPipeline"),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "tail"},
    inputs=inputs,
    captions=captions,
    phrases=base.chat_phrases(captions),
    latents=batch_norm_latents,
    presets={
        "flux2-dev": config(15360, 8, 48, 48, guidance=True),
        "flux2-klein-9b": config(12288, 8, 24, 32),
        "flux2-klein-4b": config(7680, 5, 20, 24),
    },
)
