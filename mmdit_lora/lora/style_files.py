"""Reading style LoRA files: safetensors alone, from a file, a folder or the hub, with what stands beside the tensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _fetch_state_dict
from diffusers.utils.hub_utils import _get_model_file
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdit_lora.errors import InputError, clip, listed, shown
from mmdit_lora.files import require_file
from mmdit_lora.json_files import read_object
from mmdit_lora.models.weight_files import PICKLES, check_tensor_count

_PEFT_PREFIX = "base_model.model."
# Where diffusers looks for a file.
_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def fetch_style(
    source: Any, *, weight_name: str | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by key, and the metadata: diffusers' header of the file, or the adapter_config.json beside a file of PEFT.

    Args:
        source: a file, a folder, a hub id, or the tensors themselves.
        weight_name: the file in a folder or on the hub; needed where there are several.
        options: as of diffusers' `load_lora_weights`: `subfolder`, `revision`, `token`, ...

    Raises:
        InputError: no such file, several, a pickle, or no safetensors file.
    """
    if isinstance(source, dict):
        return dict(source), None
    if not isinstance(source, str | Path):
        raise InputError(
            f"is a {type(source).__name__}, no LoRA file", hint="give a file, a folder, a hub id, or tensors by key"
        )
    for name in (weight_name, str(source)):
        if name is not None and Path(name).suffix in PICKLES:
            raise InputError("is a pickle, which may run code", location=clip(name), hint="get it as .safetensors")
    options = dict.fromkeys(_OPTIONS) | {"force_download": False} | options
    path = Path(source)
    if path.is_dir():
        path, weight_name = path / (options.pop("subfolder") or ""), weight_name or _only_file(path, options)
        source = require_file(path / weight_name, what="LoRA file")
        weight_name, options = None, options | {"subfolder": None}
    elif path.exists():
        require_file(path, what="LoRA file")
    if weight_name is None:
        _check_tensor_count(Path(source))
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    try:
        state, metadata = _fetch_state_dict(
            str(source), weight_name, True, user_agent=agent, allow_pickle=False, **options
        )
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise InputError(
            f"cannot be read: {clip(error, 300)}",
            location=str(source),
            hint="give a .safetensors file, or a folder or hub id that holds one",
        ) from None
    if metadata is not None and not isinstance(metadata, dict):
        raise InputError("its lora_adapter_metadata is no JSON object", location=str(source))
    if metadata is None and all(key.startswith(_PEFT_PREFIX) for key in state):
        metadata = _config_beside(source, options | {"user_agent": agent})
    return state, metadata


def _check_tensor_count(path: Path) -> None:
    """Raises `InputError` for more tensors than any adapter has; what else is wrong with the file diffusers tells."""
    with suppress(SafetensorError, OSError):
        with safe_open(path, framework="pt") as file:
            count = len(file.keys())
        check_tensor_count(count, path)


def _only_file(folder: Path, options: dict[str, Any]) -> str:
    folder = folder / (options.get("subfolder") or "")
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if LORA_WEIGHT_NAME_SAFE in names:
        return LORA_WEIGHT_NAME_SAFE
    if len(names) != 1:
        raise InputError(
            f"holds {len(names)} .safetensors files" + (f": {listed(names)}" if names else ""),
            location=str(folder),
            hint="say which one with weight_name" if names else "give a folder with a LoRA file",
        )
    return names[0]


def _config_beside(source: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """PEFT keeps alpha in a file of its own; without it, the factors act as they stand."""
    path = Path(source)
    try:
        file = (
            path.parent / "adapter_config.json"
            if path.exists()
            else Path(_get_model_file(source, weights_name="adapter_config.json", **options))
        )
    except (OSError, ValueError):
        return None
    if not file.exists():
        return None
    config = read_object(file, what="adapter_config.json")
    if (method := config.get("peft_type", "LORA")) != "LORA":
        raise InputError(f"is of PEFT's method {shown(method)}, and only LORA is read", location=str(file))
    return {f"transformer.{key}": value for key, value in config.items()}
