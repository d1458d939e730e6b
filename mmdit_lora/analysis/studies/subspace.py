"""Training in a random subspace of the layout stream's linears: what the intrinsic dimension is measured with.

The weights are theta_0 + P theta_d, with a fixed random P of as many columns as numbers train (Li et al. 2018,
arXiv 1804.08838, eq. 2), or per block b theta_0 + lambda_b P theta_d with a learned scale for each block (structure-aware;
Aghajanyan et al. 2020, arXiv 2012.13255, eq. 3). P is a Fastfood transform (Le et al. 2013, arXiv 1408.3060): it costs
O(D log d) time and O(D) memory and is drawn from a seed, so that no file holds it.
"""

from __future__ import annotations

import math
import re
import zlib
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.training.trainable import FoldedMethod

PARAMETER, SCALES = "layout_theta", "layout_theta_scales"
_HOME = "layout_processor"
_BLOCK = re.compile(r"^((?:\w+_)?transformer_blocks\.\d+)\.")


def subspace(dimension: int, *, structured: bool = False) -> FoldedMethod:
    """`dimension` numbers that move the stream's linears along random directions of `train.seed`, for `train`."""
    return FoldedMethod("subspace", partial(_add, dimension=dimension, structured=structured), fold_subspace)


def _add(model: nn.Module, config: Config, *, dimension: int, structured: bool) -> str:
    report = add_subspace(model, dimension, structured=structured, seed=config.train.seed)
    return f"{dimension:,} numbers move {report['weights']:,} weights"


class Fastfood(nn.Module):
    """A random linear map of `columns` to `rows` numbers whose matrix is never formed.

    Of width n, the power of two from `columns` up, it is a stack of independent blocks H G Pi H B (Le et al. 2013, eq. 7-8,
    without the length correction S): B random signs, H the Walsh-Hadamard matrix, Pi a permutation, G normal numbers. Its
    entries have variance 1 / `rows`, so that E ||P v||^2 = ||v||^2.

    Args:
        seed: the map is a function of it and of the two sizes.
    """

    def __init__(self, columns: int, rows: int, seed: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        self.width = 1 << (columns - 1).bit_length()
        blocks = -(-rows // self.width)
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (blocks, self.width), generator=draw, dtype=torch.float32) * 2 - 1
        order = torch.rand(blocks, self.width, generator=draw).argsort(dim=1)
        normals = torch.randn(blocks, self.width, generator=draw)
        # Drawn again from the seed wherever it is needed: a checkpoint does not hold them.
        for name, value in (("signs", signs), ("order", order), ("normals", normals)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        """(columns,) -> (rows,), in fp32."""
        buffers = cast(dict[str, Tensor], self._buffers)
        # Autocast would make the transforms' products bf16, and the weights are to be exact.
        with torch.autocast(v.device.type, enabled=False):
            x = nn.functional.pad(v.float(), (0, self.width - self.columns)) * buffers["signs"]
            x = hadamard(x).gather(1, buffers["order"]) * buffers["normals"]
            return hadamard(x).flatten()[: self.rows] / math.sqrt(self.width * self.rows)


def hadamard(x: Tensor) -> Tensor:
    """x H for rows of a power of two; H is the symmetric Walsh-Hadamard matrix of +1 and -1 (Sylvester's order).

    H of a b is the Kronecker product of H of a and H of b, so that two small matrix products do it.
    """
    count, width = x.shape
    left = 1 << ((width.bit_length() - 1) // 2)
    a, b = _hadamard_matrix(left, x), _hadamard_matrix(width // left, x)
    return (a @ x.view(count, left, width // left) @ b).reshape(count, width)


def _hadamard_matrix(size: int, like: Tensor) -> Tensor:
    h = like.new_ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class _Moved(nn.Module):
    """A weight W as W + scale * gain * P theta; theta and the scales belong to the whole model and are not registered here."""

    def __init__(
        self, shape: torch.Size, theta: nn.Parameter, scales: nn.Parameter | None, block: int, seed: int, gain: float
    ) -> None:
        super().__init__()
        self.shape, self.block, self.gain = shape, block, gain
        self.shared = (theta, scales)  # a tuple, so that one parameter does not get a name in every module
        self.fastfood = Fastfood(len(theta), shape.numel(), seed)

    def forward(self, weight: Tensor) -> Tensor:
        theta, scales = self.shared
        # The gain first: torch's FLOP counter does not take a parameter itself as a module's input.
        change = self.fastfood(theta * self.gain).view(self.shape)
        return weight + (change if scales is None else change * scales[self.block])


def subspace_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layout stream's linears by name, but for queries that nothing reads (of layout tokens in the last block)."""
    found = {name: m for name, m in model.named_modules() if "layout" in name and isinstance(m, nn.Linear)}
    return {
        name: linear
        for name, linear in found.items()
        if not (
            name.endswith(".add_q_proj")
            and getattr(model.get_submodule(name.rpartition(".")[0]), "context_pre_only", False)
        )
    }


def add_subspace(model: nn.Module, dimension: int, *, structured: bool, seed: int) -> dict[str, Any]:
    """Freeze the model and let `dimension` numbers move the weights of the layout stream's linears. At first they are as before.

    P is scaled by sqrt(D / d), D being the number of weights: a step of an optimizer like Adam then moves each weight by
    about the learning rate, whatever d.

    Args:
        dimension: d; with `structured` the scales, one for each block and one for the layout processor, count in it.
        seed: of P.

    Returns:
        `dimension`, `weights` (D) and `scales`.

    Raises:
        InputError: the model has no layout stream, d does not leave a number beside the scales, or is more than D.
    """
    linears = subspace_linears(model)
    blocks = list(dict.fromkeys(_block_of(name) for name in linears))
    total = sum(linear.weight.numel() for linear in linears.values())
    columns = dimension - (len(blocks) if structured else 0)
    if not linears or not 1 <= columns <= total:
        raise InputError(
            f"is {dimension}" + (f", of which {len(blocks)} are scales" if structured else ""),
            location="dimension of the subspace",
            hint=f"give {1 + dimension - columns} to {total:,}" if linears else "give a base with a layout stream",
        )
    model.requires_grad_(False)
    device = next(iter(linears.values())).weight.device
    theta = nn.Parameter(torch.zeros(columns, device=device))
    scales = nn.Parameter(torch.ones(len(blocks), device=device)) if structured else None
    # Not on the model itself: diffusers takes the dtype of its first parameter for its own.
    home = model.get_submodule(_HOME)
    home.register_parameter(PARAMETER, theta)
    if scales is not None:
        home.register_parameter(SCALES, scales)
    for name, linear in linears.items():
        linear.weight.data = linear.weight.data.float()
        # From variance 1 / (the linear's weights) to 1 / columns, the same for all linears.
        gain = math.sqrt(linear.weight.numel() / columns)
        own_seed = zlib.crc32(f"{seed} {name}".encode())
        moved = _Moved(linear.weight.shape, theta, scales, blocks.index(_block_of(name)), own_seed, gain)
        parametrize.register_parametrization(linear, "weight", moved.to(device))
    return {"dimension": dimension, "weights": total, "scales": len(blocks) if structured else 0}


@torch.no_grad()
def fold_subspace(model: nn.Module) -> dict[str, Tensor]:
    """Write the moved weights into the plain linears, and take the subspace off.

    Returns:
        Name of parameter -> its new value, fp32. Empty where the model has no subspace.
    """
    changed = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
            weight = cast(nn.Parameter, module.weight)
            weight.requires_grad_(False)
            changed[f"{name}.weight"] = weight.detach().clone()
    if changed:
        home = model.get_submodule(_HOME)
        for name in (PARAMETER, SCALES):
            home._parameters.pop(name, None)
    return changed


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else name.split(".")[0]
