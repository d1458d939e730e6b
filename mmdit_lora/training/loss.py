"""A batch and its rectified-flow loss, as in `for batch in loader: flow_matching_loss(transformer, batch).mean().backward()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from mmdit_lora.data.collate import Batch
from mmdit_lora.flow import flow_loss, inside_weight, interpolate, time_weight, velocity


@dataclass(frozen=True)
class Objective:
    """How a sample's loss is weighted; the defaults are the plain rectified-flow loss.

    Args:
        inside: weight inside boxes relative to outside.
        guidance: see `LayoutModelMixin.model_inputs`.
        weighting, min_snr_gamma: see `flow.time_weight`.
    """

    inside: float = 1.0
    guidance: float = 1.0
    weighting: str = "none"
    min_snr_gamma: float = 5.0


_PLAIN = Objective()


def predict(model: nn.Module, batch: Batch, *, guidance: float = 1.0) -> Tensor:
    """The velocity that the model sees in a noised batch, (B, C, h, w).

    Args:
        model: a layout transformer of any family, in Accelerate's wrapper or not.
        guidance: see `LayoutModelMixin.model_inputs`.
    """
    if not isinstance(model, nn.Module):
        hint = "give its transformer" if hasattr(model, "transformer") else "give a transformer with a layout"
        raise TypeError(f"the model is a {type(model).__name__}; {hint}")
    if not isinstance(batch, Batch):
        raise TypeError(f"the batch is a {type(batch).__name__}; give what LayoutEncoder makes of collated samples")
    x_t = interpolate(batch.x0, batch.noise, batch.t)
    height, width = x_t.shape[-2:]
    # The call goes through the wrapper, which gathers gradients over processes; the rest is the model's own.
    family: Any = extract_model_from_parallel(model)
    if (shared := getattr(family, "sample_keys", None)) is not None:
        shared.value = batch.keys
    dtype = family.dtype
    texts = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.texts.items()}
    inputs = family.model_inputs(x_t.to(dtype), batch.t, texts, guidance=guidance)
    return family.as_latents(model(**inputs, layout=batch.layout, return_dict=False)[0], height, width)


def flow_matching_loss(
    transformer: nn.Module, batch: Batch, objective: Objective = _PLAIN, *, target: Tensor | None = None
) -> Tensor:
    """The rectified-flow loss of each sample (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).

    The transformer sees x_t = (1 - t) x0 + t noise and predicts the velocity noise - x0; the loss of a sample is the mean
    squared error over its (C, h, w). `flow_matching_loss(...).mean().backward()` trains.

    Args:
        transformer: a layout transformer of any family, with its adapter, in Accelerate's wrapper or not.
        batch: x0 and noise (B, C, h, w), t (B,), texts of B captions, B layouts; on the
            transformer's device, of any floating dtype.
        objective: weights inside boxes and over time, and the guidance that a distilled transformer takes as input.
        target: (B, C, h, w) velocity to predict; None = that of the batch, noise - x0.

    Returns:
        (B,), fp32.
    """
    prediction = predict(transformer, batch, guidance=objective.guidance)
    if target is None:
        target = velocity(batch.x0, batch.noise)
    weight = None
    if objective.inside != 1.0:
        height, width = prediction.shape[-2:]
        weight = inside_weight(batch.layout.boxes, batch.layout.mask, height, width, objective.inside)
    each = flow_loss(prediction, target, weight)
    if objective.weighting != "none":
        each = each * time_weight(batch.t, objective.weighting, gamma=objective.min_snr_gamma)
    return each
