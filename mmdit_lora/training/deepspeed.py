"""DeepSpeed's ZeRO: what its engine takes from our config, and its optimizer's state whole and back (weights: `sharding`).

Its engine keeps fp32 weights and optimizer state flat, a part in each process, and saves them as pickles; so that checkpoints
stay safetensors, these functions go through its own calls for single parameters instead (`deepspeed.utils`, 0.19). Those of
the optimizer are collective. Only ZeRO-2 and ZeRO-3, with the optimizer on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError

STAGES = (2, 3)


def open_whole(accelerator: Accelerator) -> None:
    """From now on transformers opens encoders whole. Under ZeRO-3 it spreads them as it opens them, and nothing gathers those.

    Accelerate's `zero3_init_context_manager(enable=False)` and `zero3_init_flag: false` do not keep it from that (1.15 with
    transformers 5.24): both leave DeepSpeed's config with transformers, which reads nothing else.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def set_engine(accelerator: Accelerator, config: Config) -> None:
    """Before `prepare`: what the engine is to take from our config, not from Accelerate's. It steps within `backward`.

    Raises:
        InputError: Accelerate's config asks for another stage, or for the optimizer on the CPU or a disk.
    """
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") not in STAGES:
        raise InputError(
            f"is {zero.get('stage')}", location="Accelerate's config, zero_stage", hint="set it to 2 or 3, or use DDP"
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise InputError(
            "is set: an adapter's optimizer is a few dozen MB, and stays on the GPU",
            location="Accelerate's config, offload_optimizer_device",
            hint="set it to none; offload_param_device may be set",
        )
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": 1,  # the loop divides by its own
        "gradient_clipping": config.train.max_grad_norm,
    }


def is_zero_optimizer(optimizer: Any) -> bool:
    """Whether it is ZeRO's, in Accelerate's wrapper."""
    return hasattr(getattr(optimizer, "optimizer", None), "dp_process_group")


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """`<parameter index>.<name>` -> state, as `Optimizer.state_dict` numbers the parameters; on the CPU."""
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = optimizer.optimizer
    state = inner.optimizer.state.get(_flat(inner)[0], {})  # names, and what is no tensor, are those of every part
    found = {}
    for index, parameter in enumerate(zero_parameters(optimizer)):
        for name, value in state.items():
            if not torch.is_tensor(value) or value.ndim == 0:
                found[f"{index}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
            else:
                full = safe_get_full_optimizer_state(parameter, name)
                shape = getattr(parameter, "ds_shape", parameter.shape)
                found[f"{index}.{name}"] = full.detach().cpu().reshape(shape).contiguous()
    return found


def put_optimizer(optimizer: Any, state: dict[int, dict[str, Tensor]]) -> None:
    """Take back what `optimizer_tensors` gave, by parameter index."""
    from deepspeed.utils import safe_set_full_optimizer_state

    inner = optimizer.optimizer
    for flat in _flat(inner):  # a fresh optimizer has none before its first step
        inner.optimizer.state[flat] = {
            name: value.clone() if value.ndim == 0 else torch.zeros_like(flat) for name, value in state[0].items()
        }
    if hasattr(inner, "_lazy_init_hp_params_optimizer_state"):
        inner._lazy_init_hp_params_optimizer_state()
    for index, parameter in enumerate(zero_parameters(optimizer)):
        for name, value in state[index].items():
            if value.ndim:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device).float(), name)


def zero_parameters(optimizer: Any) -> list[Tensor]:
    """The parameters that train, in the order in which the optimizer was given them."""
    inner = optimizer.optimizer
    groups = inner.bit16_groups if hasattr(inner, "bit16_groups") else inner.fp16_groups
    return [parameter for group in groups for parameter in group]


def _flat(inner: Any) -> list[Tensor]:
    """This process's flat fp32 parts, one a group; the keys of the optimizer's state."""
    parts: list[Tensor] = getattr(inner, "single_partition_of_fp32_groups", None) or inner.fp32_partitioned_groups_flat
    return parts
