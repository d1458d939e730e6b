"""How much the subspaces of two matrices have in common (LoRA, arXiv 2106.09685, section 7.2 and appendix G)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.analysis.spectrum import of_product, phi

Which = Literal["A", "BA"]
Directions = dict[str, Tensor]  # of a module's input space, by module


def directions(rows: Tensor) -> Tensor:
    """Right-singular vectors of (r, n) rows, the strongest first: (min(r, n), n), orthonormal."""
    return torch.linalg.svd(rows.double(), full_matrices=False).Vh


def adapter_directions(folder: Path, which: Which) -> Directions:
    """Directions in each module's input space, by module: of A, as in the paper, or of the whole update B A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    out = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        out[module] = of_product(tensors[f"{module}.lora_B.weight"], a).right.T if which == "BA" else directions(a)
    return out


def compare(pairs: Iterable[tuple[Directions, Directions]]) -> Tensor:
    """(pairs, modules, r, s) similarities of two adapters of the same modules each."""
    return torch.stack([torch.stack([phi(one[name], other[name]) for name in one]) for one, other in pairs])


def random_pairs(pairs: Iterable[tuple[Directions, Directions]]) -> list[tuple[Directions, Directions]]:
    """Directions of Gaussian matrices of the same shapes, as drawn beside in the paper's figures."""
    draw = torch.Generator().manual_seed(0)

    def gaussian(like: Tensor) -> Tensor:
        return directions(torch.randn(like.shape, generator=draw, dtype=torch.float64))

    drawn: list[tuple[Directions, Directions]] = []
    for one, other in pairs:
        drawn.append(({}, {}))
        for name in one:
            drawn[-1][0][name], drawn[-1][1][name] = gaussian(one[name]), gaussian(other[name])
    return drawn
