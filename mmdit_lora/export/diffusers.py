"""Our adapters for diffusers' `load_lora_weights`: a folder of one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from mmdit_lora.lora import DIFFUSERS_FILE, HEADER_KEY, lora_state_dict, save_tensors, stored_config

_PREFIX = "transformer."


def write_diffusers(model: Any, folder: Path, header: Mapping[str, Any]) -> None:
    """Write `folder/pytorch_lora_weights.safetensors`; rank, alpha and targets are in the file's header."""
    save_for_diffusers(lora_state_dict(model), stored_config(model.peft_config["default"]), folder, header)


def save_for_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, header: Mapping[str, Any]
) -> None:
    """The file of an adapter whose tensors and config are at hand.

    Args:
        tensors: by the names of the transformer's modules. config: of PEFT. header: our own metadata.
    """
    theirs = {_PREFIX + key: value for key, value in config.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: theirs, HEADER_KEY: dict(header)}
    texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    save_tensors({_PREFIX + name: value for name, value in tensors.items()}, folder / DIFFUSERS_FILE, texts)
