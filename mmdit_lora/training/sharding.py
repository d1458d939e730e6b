"""Parameters that are spread over processes (FSDP2's DTensors): whole for a checkpoint, and spread again from one.

Both are collective: every process calls them, in the same order.
"""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mmdit_lora.config import Config
from mmdit_lora.errors import InputError


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


def parted(model: nn.Module) -> None:
    """Give up what a forward without a backward left gathered (the root's parameters): it would be used again as it is, and
    be taken for the parameters, whatever is written into their parts meanwhile."""
    if isinstance(model, FSDPModule):
        model.reshard()


def is_sharded(kind: DistributedType) -> bool:
    """Whether a forward of the model needs every process, so that none may validate alone."""
    return bool(kind == DistributedType.FSDP)


def check_sharding(kind: DistributedType, config: Config) -> None:
    """Whether a run can be spread over processes as Accelerate was told.

    Raises:
        InputError: by DeepSpeed; or by FSDP, and it trains more than an adapter, or has the old domain to paint.
    """
    if kind == DistributedType.DEEPSPEED:
        raise InputError(
            "has DeepSpeed: its engine steps by itself, and keeps the optimizer in pickles, which are never read here",
            where="Accelerate's config",
            cure="an adapter's optimizer is a few dozen MB: use DDP, or FSDP2 for a base that one GPU cannot hold",
        )
    if kind != DistributedType.FSDP:
        return
    if config.method != "lora":
        raise InputError(
            f"is {config.method} with FSDP, which trains adapters here", where="method", cure="use DDP, or method lora"
        )
    if config.prior.layouts is not None:
        raise InputError("is given with FSDP", where="prior.layouts", cure="use DDP, or set it to null")
