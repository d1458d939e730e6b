"""One training step, on one screen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from mmdit_lora.flow import flow_loss, inside_weight, interpolate, velocity
from mmdit_lora.models import LayoutInputs


@dataclass(frozen=True)
class Batch:
    """All that a step reads; everything random in it is already drawn.

    Args:
        x0: (B, C, h, w) latents; noise: the same shape; t: (B,) in [0, 1], 1 = noise.
        prompt_embeds: (B, S, E); pooled: (B, P).
        layout: B layouts; a dropped one is masked, never absent.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    layout: LayoutInputs

    def to(self, device: torch.device) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def losses(model: nn.Module, batch: Batch, *, inside: float = 1.0, guidance: float = 1.0) -> Tensor:
    """The rectified-flow loss of each sample, (B,) fp32.

    Args:
        model: a layout transformer of any family, in Accelerate's wrapper or not.
        inside: weight of the loss inside boxes relative to outside; 1 = the plain loss.
        guidance: see `LayoutModelMixin.model_inputs`.
    """
    x_t = interpolate(batch.x0, batch.noise, batch.t)
    height, width = x_t.shape[-2:]
    # The call goes through the wrapper, which gathers gradients over processes; the rest is the model's own.
    family: Any = extract_model_from_parallel(model)
    dtype = family.dtype
    inputs = family.model_inputs(
        x_t.to(dtype), batch.t, batch.prompt_embeds.to(dtype), batch.pooled.to(dtype), guidance=guidance
    )
    prediction = family.as_latents(model(**inputs, layout=batch.layout).sample, height, width)
    weight = None
    if inside != 1.0:
        weight = inside_weight(batch.layout.boxes, batch.layout.mask, height, width, inside)
    return flow_loss(prediction, velocity(batch.x0, batch.noise), weight)
