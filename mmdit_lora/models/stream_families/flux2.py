"""FLUX.2 (dev, klein 4B and 9B): diffusers 0.42.1, models/transformers/transformer_flux2.py and pipelines/flux2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily, pack, unpack

_KEYS = ("joint_attention_dim", "num_layers", "num_single_layers", "num_attention_heads", "guidance_embeds")
_SIZES = {
    "flux2-dev": (15360, 8, 48, 48, True),
    "flux2-klein-9b": (12288, 8, 24, 32, False),
    "flux2-klein-4b": (7680, 5, 20, 24, False),
}


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:
    (batch, _, height, width), embeds = x.shape, texts["embeds"]
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "guidance": x.new_full((batch,), guidance) if model.config.guidance_embeds else None,
        "encoder_hidden_states": embeds,
        "txt_ids": base.cartesian_ids(1, 1, 1, embeds.shape[1], device=x.device).expand(batch, -1, -1),
        "img_ids": base.cartesian_ids(1, height // 2, width // 2, 1, device=x.device).expand(batch, -1, -1),
    }


def latents(vae: Any, pixels: Tensor) -> Tensor:
    """The mode, 2 x 2 cells normalised together by the VAE's batch norm, as (B, C, h, w) again."""
    mode = vae.encode(pixels).latent_dist.mode()
    norm, eps = vae.bn, vae.config.batch_norm_eps
    packed = (pack(mode) - norm.running_mean) / (norm.running_var + eps).sqrt()
    return unpack(packed.to(mode.dtype), *mode.shape[-2:])


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    layers = pipe.config.get("text_encoder_out_layers")
    chosen = {} if layers is None else {"text_encoder_out_layers": tuple(layers)}
    return {"embeds": pipe.encode_prompt(list(texts), max_sequence_length=max_length, **chosen)[0]}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    """The mean over the tokens that the chat template makes of a phrase."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    read = [pipe.tokenizer.apply_chat_template(chat, **template) for chat in chats]
    mask = pipe.tokenizer(
        read, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    ).attention_mask
    states = captions(pipe, texts, 64)["embeds"]
    return base.masked_mean(states, mask.to(states.device))


FLUX2 = StreamFamily(
    name="flux2",
    transformer="Flux2Transformer2DModel",
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline", "Flux2KleinInpaintPipeline"),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "tail"},
    width=base.inner_dim,
    phrase_dim=lambda config: config.joint_attention_dim,
    grid=lambda _, call: base.grid_of_ids(call["img_ids"]),
    time=base.thousands(),
    inputs=inputs,
    outputs=unpack,
    captions=captions,
    phrases=phrases,
    latents=latents,
    presets={name: dict(zip(_KEYS, sizes, strict=True)) for name, sizes in _SIZES.items()},
)
