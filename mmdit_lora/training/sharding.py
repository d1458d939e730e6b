"""Parameters that are spread over processes (FSDP2's DTensors, ZeRO's parts): whole for a checkpoint, spread again from one.

Both are collective: every process calls them, in the same order.
"""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.training.deepspeed import is_zero, put_master, whole_master

_SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, contiguous."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if is_zero(tensor):
        full = whole_master(tensor)
    return full.detach().cpu().contiguous()


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Copy a full tensor into one that may be spread."""
    if is_zero(target):
        put_master(target, values)
    else:
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


def shards_parameters(kind: DistributedType) -> bool:
    """Whether a forward of the model needs every process, so that none may validate alone."""
    return kind in _SHARDED


def check_sharding(kind: DistributedType, config: Config) -> None:
    """Whether a run can be spread over processes as Accelerate was told.

    Raises:
        InputError: it is to be spread, and trains more than an adapter, has the old domain to paint, or has what DeepSpeed's
            engine does not know.
    """
    if kind not in _SHARDED:
        return
    name = _SHARDED[kind]
    if config.method != "lora":
        raise InputError(
            f"is {config.method} with {name}, which trains adapters here",
            location="method",
            hint="use DDP, or method lora",
        )
    if config.prior.layouts is not None:
        raise InputError(f"is given with {name}", location="prior.layouts", hint="use DDP, or set it to null")
    if kind != DistributedType.DEEPSPEED:
        return
    train = config.train
    if train.ema_decay:
        raise InputError(
            f"is {train.ema_decay:g} with {name}, which has no average of its masters",
            location="train.ema_decay",
            hint="set it to 0, or use DDP or FSDP2",
        )
    if train.mixed_precision == "fp16":
        raise InputError(
            f"is fp16 with {name}, whose loss scale is in none of our checkpoints",
            location="train.mixed_precision",
            hint="set it to bf16",
        )
    if train.optimizer != "adamw":
        raise InputError(
            f"is {train.optimizer} with {name}, which flattens the weights",
            location="train.optimizer",
            hint="set it to adamw",
        )
