"""Our adapters in the names of kohya-ss/sd-scripts: one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.lora import HEADER_KEY, KOHYA_PREFIX, save_tensors

_DIGEST_KEY = "mmdit_lora_sha256"  # in the header of a file of its own


def write_kohya(model: Any, file: Path, header: dict[str, Any]) -> None:
    """One file in the names of kohya-ss/sd-scripts: `lora_unet_<module, dots as underscores>.lora_down.weight`, ...

    Their update is alpha / rank * up @ down, whatever scaling PEFT was told to use.
    """
    config = model.peft_config["default"]
    if config.use_dora or config.lora_bias:
        raise InputError(
            "is a DoRA or has biases, which these names cannot hold", hint="export it --to peft or diffusers"
        )
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            flat = KOHYA_PREFIX + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = module.lora_A["default"].weight
            tensors[f"{flat}.lora_up.weight"] = module.lora_B["default"].weight
            tensors[f"{flat}.alpha"] = torch.tensor(module.scaling["default"] * module.r["default"])
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
        "ss_base_model_version": model.family,
        "ss_sd_model_name": str(header.get("base", "")),
        HEADER_KEY: json.dumps(header, sort_keys=True),
    }
    # The digest tells a file that was changed since from what was written.
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    save_tensors(tensors, file, {**metadata, _DIGEST_KEY: _digest(tensors, metadata)})


def is_kohya_export(file: Path) -> bool:
    """Whether a file is what `write_kohya` wrote, unchanged."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        return metadata.get(_DIGEST_KEY) == _digest(state, metadata)
    except (SafetensorError, OSError):
        return False


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of what a file states and holds, in fp32, but for `_DIGEST_KEY` itself and what `save_tensors` adds."""
    stated = {key: value for key, value in metadata.items() if key not in (_DIGEST_KEY, "format")}
    digest = hashlib.sha256(json.dumps([stated, sorted(tensors)], sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
