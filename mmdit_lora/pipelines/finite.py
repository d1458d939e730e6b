"""Latents and decoded images that hold NaN or infinity are refused, before they are rounded to pixels: NaN becomes black there."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from mmdit_lora.errors import NonFiniteError


def require_finite(images: Tensor, what: str) -> None:
    """Look at a batch (B, ...), its device once.

    Args:
        what: "images" or "latents", for the message.

    Raises:
        NonFiniteError: an element of some of them is NaN or infinite.
    """
    bad = (~each_finite(images)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(bad, len(images), what=what, dtype=str(images.dtype).removeprefix("torch."))


def each_finite(images: Tensor) -> Tensor:
    """(B, ...) -> (B,) bool on the same device, which is not waited for."""
    return torch.isfinite(images).flatten(1).all(1)


class FiniteImageProcessor(VaeImageProcessor):
    """diffusers' image processor, which looks at what the VAE has decoded."""

    def postprocess(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'.

        Raises:
            NonFiniteError: see `require_finite`.
        """
        require_finite(image, "images")
        return super().postprocess(image, *args, **kwargs)
