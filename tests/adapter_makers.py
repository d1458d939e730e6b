"""Adapters whose updates are known, on the tiny transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mmdit_lora.lora import add_layout_lora, base_fingerprint, save_adapter
from tests.tiny import tiny_transformer

Factors = Callable[[str, Tensor, int], tuple[Tensor, Tensor]]  # name, W (m, n), r -> scale * B A as (m, r) and (r, n)


def make_adapter(folder: Path, base: Path | str, factors: Factors, *, magnitude: float = 1.0, **config: Any) -> Path:
    """An adapter folder whose updates are the given products, whatever its ranks and alphas.

    Args:
        magnitude: of DoRA, a factor of the norms of the rows of W + scale * B A.
        config: of `peft.LoraConfig`; default r=16, alpha=32 on the usual targets.
    """
    model = tiny_transformer()
    fingerprint = base_fingerprint(model)
    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["layout_mlp.fc1", "layout_mlp.fc2"]}
    add_layout_lora(model, peft.LoraConfig(**{**settings, **config}))
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            made: Any = layer
            weight = made.get_base_layer().weight.detach()
            up, down = factors(name, weight, made.r["default"])
            with torch.no_grad():
                made.lora_B["default"].weight.copy_(up / (made.scaling["default"] or 1))
                made.lora_A["default"].weight.copy_(down)
                if config.get("use_dora"):
                    rows = torch.linalg.vector_norm(weight + up @ down, dim=1)
                    made.lora_magnitude_vector["default"].weight.copy_(magnitude * rows)
    save_adapter(
        model, folder, metadata={"base": str(base), "fingerprint": fingerprint, "r": 16}, card="# A card\n\nText.\n"
    )
    return folder


def rank_four(
    name: str, weight: Tensor, r: int, values: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Singular values 0.1 * `values`, mixed over all r rows of A, so that nothing but the SVD shows the rank."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    count = len(values)

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]

    left, right, mix = orthonormal(weight.shape[0], count), orthonormal(weight.shape[1], count), orthonormal(r, count)
    up = left * (0.1 * torch.tensor(values, dtype=torch.float64))
    return (up @ mix.T).float(), (mix @ right.T).float()
