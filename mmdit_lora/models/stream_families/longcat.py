"""LongCat-Image: diffusers 0.42.1, transformer_longcat_image.py and pipelines/longcat_image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation
from torch import Tensor

from mmdit_lora.models.latents import cartesian_ids, pack
from mmdit_lora.models.stream_families import base
from mmdit_lora.models.stream_families.base import StreamFamily


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    """Text stands on the diagonal, the image behind it: at (S, S) and on."""
    (_, _, height, width), embeds, tokens = x.shape, texts["embeds"], texts["embeds"].shape[1]
    place = cartesian_ids(1, height // 2, width // 2, device=x.device)
    diagonal = torch.arange(tokens, device=x.device).float()
    return {
        "hidden_states": pack(x),
        "timestep": t,
        "guidance": None,
        "encoder_hidden_states": embeds,
        "txt_ids": torch.stack([torch.zeros_like(diagonal), diagonal, diagonal], -1),
        "img_ids": place.float() + torch.tensor([1.0, tokens, tokens], device=x.device),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:  # noqa: ARG001
    """Always of the pipeline's own length, which the image's place follows; the base attends to the padding."""
    return {"embeds": pipe.encode_prompt(list(texts))[0]}


def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
    """The mean over a phrase's own tokens; the pipeline reads what is quoted letter by letter."""
    states = captions(pipe, texts, 0)["embeds"]
    parts = [[p for part, quoted in split_quotation(text) for p in (part if quoted else [part])] for text in texts]
    counts = [sum(len(pipe.tokenizer.tokenize(part)) for part in each) for each in parts]
    place = torch.arange(states.shape[1], device=states.device)
    return base.masked_mean(states, place < torch.tensor(counts, device=states.device)[:, None])


LONGCAT = StreamFamily(
    "longcat",
    "LongCatImageTransformer2DModel",
    ("LongCatImagePipeline",),
    blocks={"transformer_blocks": "all", "single_transformer_blocks": "all"},
    inputs=inputs,
    captions=captions,
    phrases=phrases,
    guide=lambda scale, _: {"guidance_scale": scale, "enable_prompt_rewrite": False},
    presets={"longcat-image": {}},
)
