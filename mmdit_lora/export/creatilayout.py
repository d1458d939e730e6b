"""Our adapters and streams under CreatiLayout's names, for its classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.export.diffusers import save_for_diffusers
from mmdit_lora.lora import DIFFUSERS_FILE, lora_state_dict, stored_config
from mmdit_lora.models.creatilayout import lora_to_creatilayout, stream_to_creatilayout, variant_of_model

ADAPTER_FILE = DIFFUSERS_FILE
STREAM_FILE = "model.safetensors"


def write_creatilayout_adapter(
    model: Any, folder: str | Path, header: Mapping[str, Any] | None = None, *, adapter_name: str = "default"
) -> None:
    """Write `folder/pytorch_lora_weights.safetensors` for `load_lora_adapter` of CreatiLayout's transformer classes.

    Rank and alpha of every module are in the file's header, and the adapter's own metadata.

    Raises:
        InputError: the stream or the adapter is of a form that CreatiLayout has not.
    """
    variant = variant_of_model(model)
    config = stored_config(model.peft_config[adapter_name])
    state = lora_state_dict(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.scaling:
            continue
        factors = {
            key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.lora_")
        }
        try:
            theirs, factors = lora_to_creatilayout(name, factors, variant)
        except KeyError:
            raise InputError(f"the adapter is on {name} too, which CreatiLayout's stream has not") from None
        tensors |= {f"{theirs}.{key}": value for key, value in factors.items()}
        ranks[theirs], alphas[theirs] = module.r[adapter_name], module.lora_alpha[adapter_name]
    config |= {"target_modules": sorted(ranks), "rank_pattern": ranks, "alpha_pattern": alphas}
    save_for_diffusers(tensors, config, Path(folder), header or {})


def write_creatilayout_stream(model: Any, folder: str | Path) -> None:
    """Write `folder/model.safetensors`: the whole layout stream, no adapter on it, in the model's dtype.

    Raises:
        InputError: the stream is of a form that CreatiLayout has not.
    """
    variant = variant_of_model(model)
    stream = {name: value for name, value in model.state_dict().items() if "layout" in name}
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in stream_to_creatilayout(stream, variant).items()
    }
    save_file(tensors, Path(folder) / STREAM_FILE, metadata={"format": "pt"})
