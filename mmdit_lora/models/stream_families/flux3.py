"""FLUX.3 klein base: Flux3Transformer2DModel, Flux3ModularPipeline of diffusers 0.42.1 (there is no other pipeline)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from torch import Tensor

from mmdit_lora.models.latents import batch_norm_latents, cartesian_ids, pack
from mmdit_lora.models.stream_families import base


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    embeds, (height, width) = texts["embeds"], x.shape[-2:]
    ids = cartesian_ids(1, height // 2, width // 2, 1, device=x.device)
    return {
        "hidden_states": pack(x),
        "encoder_hidden_states": embeds,
        "timestep": t.to(x.dtype),
        "img_ids": ids * torch.tensor([1, 0.5, 0.5, 1], device=x.device),
        "txt_ids": cartesian_ids(1, 1, 1, embeds.shape[1], device=x.device).float(),
    }


def counts(pipe: Any, texts: Sequence[str], max_length: int) -> list[int]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    read = pipe.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return [min(len(ids), max_length) for ids in pipe.tokenizer.tokenizer(read)["input_ids"]]


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """In the window of the longest of them, a multiple of 80 tokens: the base attends to the padding."""
    window = min(-(-max(counts(pipe, texts, max_length)) // 80) * 80, max_length)
    encode, parts = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds, (pipe.text_encoder, pipe.tokenizer)
    return {"embeds": torch.cat([encode(*parts, text, None, max_length, window) for text in texts])}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    states, own = captions(pipe, texts, 240)["embeds"], torch.tensor(counts(pipe, texts, 240))
    return base.masked_mean(states, (torch.arange(states.shape[1]) < own[:, None]).to(states.device))


FLUX3 = base.StreamFamily(
    *("flux3", "Flux3Transformer2DModel", ("Flux3ModularPipeline",)),
    blocks={"mode_blocks.image": "all", "single_transformer_blocks": "all"},
    grid=lambda _, call: (len(call["img_ids"][:, 1].unique()), len(call["img_ids"][:, 2].unique())),
    inputs=inputs,
    captions=captions,
    ragged=True,
    phrases=phrases,
    guidance="alternate",
    latents=batch_norm_latents,
    max_length=8192,
    presets={"flux3-klein": {}},
)
