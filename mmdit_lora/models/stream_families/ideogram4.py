"""Ideogram 4: Ideogram4Transformer2DModel, Ideogram4Pipeline of diffusers 0.42.1. Its own clock has 1 = data.

One sequence: padding, text, image. Another transformer guides, without text and without a layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Ideogram4Pipeline
from torch import Tensor

from mmdit_lora.models.latents import batch_norm_latents, pack, unpack
from mmdit_lora.models.stream_families import base


def inputs(model: Any, x: Tensor, t: Tensor, texts: Mapping[str, Tensor], guidance: float) -> dict[str, Any]:  # noqa: ARG001
    (height, width), counts, longest = x.shape[-2:], texts["mask"].sum(1).long().tolist(), texts["mask"].shape[1]
    text = torch.stack([row.roll(longest - n, 0) for row, n in zip(texts["embeds"], counts, strict=True)])
    ids = Ideogram4Pipeline._prepare_ids(counts, height // 2, width // 2, longest, x.device)
    return {
        "hidden_states": F.pad(pack(x, cells_first=True), (0, 0, longest, 0)),
        "timestep": (1 - t).to(x.dtype),
        "encoder_hidden_states": F.pad(text, (0, 0, 0, height * width // 4)).to(x.dtype),
        **dict(zip(("position_ids", "segment_ids", "indicator"), ids, strict=True)),
    }


def captions(pipe: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """As long as the longest, padded right: no token attends to the padding, and no place depends on it."""
    embeds, _, _, roles = pipe.encode_prompt(list(texts), 1, 1, max_length, pipe._execution_device)
    counts = (roles[:, :max_length] != 0).sum(1).tolist()
    rows = [row[max_length - n : max_length] for row, n in zip(embeds, counts, strict=True)]
    mask = torch.arange(max(counts), device=embeds.device) < torch.tensor(counts, device=embeds.device)[:, None]
    return {"embeds": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "mask": mask}


IDEOGRAM4 = base.StreamFamily(
    *("ideogram4", "Ideogram4Transformer2DModel", ("Ideogram4Pipeline",)),
    blocks={"layers": "tail"},
    phrase_dim=lambda config: config.llm_features_dim,
    grid=lambda _, call: base.grid_of_ids(call["position_ids"][0][call["indicator"][0] == 2]),
    time=lambda call: 1000 * (1 - call["timestep"].float()),
    inputs=inputs,
    outputs=lambda y, h, w: -unpack(y[:, -(h * w // 4) :], h, w, cells_first=True),
    captions=captions,
    phrases=lambda pipe, texts: base.masked_mean(*captions(pipe, texts, 256).values()),
    guidance="single",
    guide=lambda scale, _: {"guidance_scale": scale, "guidance_schedule": None},
    masked=True,
    ragged=True,
    latents=partial(batch_norm_latents, cells_first=True),
    max_length=2048,
    presets={"ideogram4": {}},
)
