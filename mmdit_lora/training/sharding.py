"""Parameters that are spread over processes (FSDP2's DTensors, ZeRO's parts): whole for a checkpoint, spread again from one.

All are collective: every process calls them, in the same order.

Why not `torch.distributed.checkpoint.state_dict` (read in 2.15) or `Accelerator.save_state` (1.15): the former knows DTensors,
for which one line is enough here, and not ZeRO; and to load an optimizer's state it first steps the optimizer once, with
gradients of 0, which changes what Prodigy keeps of its own. The latter writes pickles, and the base with what trains.
"""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError

_SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, contiguous; of a parameter under ZeRO, its fp32 master."""
    if _is_zero(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        tensor = safe_get_full_fp32_param(tensor)
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


@torch.no_grad()
def copy_full(target: Tensor, values: Tensor) -> None:
    """Copy a full tensor into one that may be spread; under ZeRO, into its fp32 master too."""
    if not _is_zero(target):
        target.copy_(shard_like(values, target))
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    values = values.to(target.device)
    with deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
        target.copy_(values)
    safe_set_full_fp32_param(target, values.float())


def shard_like(values: Tensor, target: Tensor) -> Tensor:
    """A full tensor, spread as `target` is where it is and where the shapes agree."""
    if isinstance(target, DTensor) and values.shape == target.shape:
        return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    return values


def reshard(model: nn.Module) -> None:
    """Give up what a forward without a backward left gathered (the root's parameters): it would be used again as it is, and
    be taken for the parameters, whatever is written into their parts meanwhile."""
    if isinstance(model, FSDPModule):
        model.reshard()


def shards_parameters(kind: DistributedType) -> bool:
    """Whether a forward of the model needs every process, so that none may validate alone."""
    return kind in _SHARDED


def check_sharding(kind: DistributedType, config: Config) -> None:
    """Whether a run can be spread over processes as Accelerate's config says.

    Raises:
        InputError: it is to be spread, and trains more than an adapter, has `prior.layouts`, or uses what DeepSpeed's
            engine does not know.
    """
    if kind not in _SHARDED:
        return
    name, train = _SHARDED[kind], config.train
    refused = [
        ("method", config.method, config.method != "lora", "trains adapters here", "use DDP, or method lora"),
        (
            "prior.layouts",
            "given",
            config.prior.layouts is not None,
            "generates no images of an old domain",
            "use DDP, or set it to null",
        ),
    ]
    if kind == DistributedType.DEEPSPEED:
        precision, average = train.mixed_precision, "set it to 0, or use DDP or FSDP2"
        refused += [
            ("train.ema_decay", f"{train.ema_decay:g}", train.ema_decay > 0, "has no average of its masters", average),
            (
                "train.mixed_precision",
                precision,
                precision == "fp16",
                "keeps its loss scale in none of our checkpoints",
                "set it to bf16",
            ),
            ("train.optimizer", train.optimizer, train.optimizer != "adamw", "flattens the weights", "set it to adamw"),
        ]
    for key, value, wrong, why, hint in refused:
        if wrong:
            raise InputError(f"is {value} with {name}, which {why}", location=key, hint=hint)


def _is_zero(parameter: Tensor) -> bool:
    """Whether ZeRO has a master of this parameter in parts: one that trains."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
