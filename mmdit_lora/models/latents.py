"""Latents as transformers take them: of an image by the VAE, in tokens of 2 x 2 cells, and the places of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(latents: Tensor, *, cells_first: bool = False) -> Tensor:
    """(B, C, h, w) -> (B, h w / 4, 4 C): 2 x 2 cells a token, as FLUX.1's and Qwen-Image's pipelines pack.

    Args:
        cells_first: the cells of the first channel do not come first, but the first cell's channels: Ideogram's order.
    """
    batch, channels, height, width = latents.shape
    latents = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    latents = latents.permute((0, 2, 4, 3, 5, 1) if cells_first else (0, 2, 4, 1, 3, 5))
    return latents.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int, *, cells_first: bool = False) -> Tensor:
    """The inverse of `pack`; height and width are those of the latents."""
    batch, _, channels = tokens.shape
    tokens = tokens.unflatten(-1, (4, -1)).transpose(-1, -2) if cells_first else tokens
    tokens = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(batch, channels // 4, height, width)


def scaled_latents(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode, shifted and scaled by the VAE's config, (B, C, h, w) fp32."""
    latents: Tensor = vae.encode(pixels).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def one_frame_latents(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode of a video of one frame, each channel normalised by the VAE's config, (B, C, h, w)."""
    latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (latents.new_tensor(vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) / std


def batch_norm_latents(vae: Any, pixels: Tensor, *, cells_first: bool = False) -> Tensor:
    """The mode, 2 x 2 cells normalised together by the batch norm of FLUX.2's VAE, as (B, C, h, w) again."""
    mode = vae.encode(pixels).latent_dist.mode()
    packed = (pack(mode, cells_first=cells_first) - vae.bn.running_mean) / (
        vae.bn.running_var + vae.config.batch_norm_eps
    ).sqrt()
    return unpack(packed.to(mode.dtype), *mode.shape[-2:], cells_first=cells_first)


def cartesian_ids(*sizes: int, device: torch.device) -> Tensor:
    """Every combination of range(size) for each of `sizes`, (product, axes), the last running fastest."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
