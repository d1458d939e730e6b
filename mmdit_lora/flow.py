"""The objective: rectified flow as in Stable Diffusion 3 (Esser et al., arXiv 2403.03206).

Stated once, here: t is in [0, 1] and 1 is noise; x_t = (1 - t) x_0 + t noise; the model predicts the velocity
noise - x_0; its `timestep` argument is 1000 t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

TimestepDensity = Literal["logit_normal", "mode", "uniform"]


def sample_timesteps(
    count: int,
    *,
    density: TimestepDensity = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training times t, (count,) fp32 in [0, 1].

    Args:
        density: "logit_normal" (eq. 19), "mode" (eq. 20) or "uniform".
        logit_mean, logit_std: of the normal behind the logistic function; a positive mean leans towards noise.
        mode_scale: s of eq. 20; positive favours the middle, negative the ends.
        shift: moves the density towards noise, for larger images; see `shift_timesteps`.
    """
    # As diffusers.training_utils.compute_density_for_timestep_sampling, which a loader's worker would import half a minute for.
    if density == "logit_normal":
        t = torch.normal(logit_mean, logit_std, (count,), generator=generator).sigmoid()
    else:
        t = torch.rand(count, generator=generator)
        if density == "mode":
            t = 1 - t - mode_scale * (torch.cos(math.pi * t / 2) ** 2 - 1 + t)
    return shift_timesteps(t, shift)


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t) (eq. 23, s = sqrt(m / n)): the same signal-to-noise ratio at a larger resolution."""
    return shift * t / (1 + (shift - 1) * t)


def scheduler_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift s that a base's scheduler gives an image: its own constant, or, with dynamic shifting, one that grows with the
    number of image tokens (diffusers' `calculate_shift` and `FlowMatchEulerDiscreteScheduler.time_shift`).

    Args:
        scheduler: its config. tokens: of the image that the transformer sees.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift") or 1.0)
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = least + (most - least) * (tokens - few) / (many - few)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t noise; x0 and noise (B, C, H, W), t (B,)."""
    t = t.to(x0).view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / dt = noise - x_0, what the model predicts."""
    return noise - x0


def flow_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error per sample, (B,) fp32.

    Args:
        prediction, target: (B, C, H, W) velocities.
        weight: (B, 1, H, W) with mean 1 in every sample, from `inside_weight`; None = 1 everywhere.
    """
    squared = (prediction.float() - target.float()) ** 2
    if weight is not None:
        squared = squared * weight
    return squared.flatten(1).mean(1)


def time_weight(t: Tensor, kind: str, *, gamma: float = 5.0) -> Tensor:
    """Weight of a sample's loss by its time, the shape of `t`, fp32.

    Args:
        t: in [0, 1], 1 = noise.
        kind: "none"; "sigma_sqrt" and "cosmap" (Esser et al. 2024, arXiv 2403.03206, as in diffusers'
            `training_utils`); "min_snr" (Hang et al. 2023, arXiv 2303.09556): the loss of x_0 is
            weighted by min(SNR, gamma), with SNR = ((1 - t) / t)^2. An error e of the velocity is one of t e in x_0, so
            that the velocity's loss gets min((1 - t)^2, gamma t^2).
        gamma: where "min_snr" cuts.
    """
    t = t.float()
    if kind == "min_snr":
        return torch.minimum((1 - t) ** 2, gamma * t**2)
    if kind == "sigma_sqrt":
        return t**-2.0
    if kind == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    return torch.ones_like(t)


def inside_weight(boxes: Tensor, mask: Tensor, height: int, width: int, weight: float) -> Tensor:
    """Loss weights that count the inside of boxes `weight` times as much as the outside, (B, 1, height, width).

    Cells that a box covers in part count in part; overlapping boxes count once. Each sample is scaled to a mean of 1,
    so that the loss of images with many boxes does not outweigh that of others.

    Args:
        boxes: (B, N, 4) xyxy in [0, 1].
        mask: (B, N) bool, True = a real box.
    """

    def coverage(start: Tensor, end: Tensor, cells: int) -> Tensor:  # (B, N) -> (B, N, cells), share of each cell
        edges = torch.arange(cells, device=boxes.device, dtype=torch.float32)
        upper = torch.minimum(end[..., None] * cells, edges + 1)
        return (upper - torch.maximum(start[..., None] * cells, edges)).clamp(0, 1)

    left, top, right, bottom = boxes.float().unbind(-1)
    inside = coverage(top, bottom, height)[..., :, None] * coverage(left, right, width)[..., None, :]
    inside = inside * mask[..., None, None]
    covered = 1 - (1 - inside).prod(dim=1)  # (B, height, width)
    weights = 1 + (weight - 1) * covered
    return (weights / weights.mean(dim=(1, 2), keepdim=True)).unsqueeze(1)
