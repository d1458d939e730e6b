"""Parameters that are spread over processes (FSDP2's DTensors): whole for a checkpoint, and spread again from one.

Both are collective: every process calls them, in the same order.
"""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, contiguous."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy a full tensor into one that may be spread."""
    target.copy_(like(values, target))


def like(values: Tensor, target: Tensor) -> Tensor:
    """A full tensor, spread as `target` is where it is and where the shapes agree."""
    if isinstance(target, DTensor) and values.shape == target.shape:
        return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    return values


def is_sharded(kind: DistributedType) -> bool:
    """Whether a forward of the model needs every process, so that none may validate alone."""
    return kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
