"""Weights on disk: reading safetensors, a file or a folder of shards, and what is refused of a stored model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.config.ranges import Range
from mmdit_lora.errors import InputError, listed
from mmdit_lora.files import exists, inside, public_name, write_json
from mmdit_lora.hub import INDEX, MODULAR_INDEX
from mmdit_lora.json_files import read_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_TENSORS = 20_000  # ten times those of an adapter for every linear of the largest base


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, or of a folder of shards, on the CPU, as stored; their pages are read as needed.

    Raises:
        InputError: no such file, a pickle, a damaged file, a shard that the index names is missing, or a tensor is of no
            floating-point dtype that a transformer is stored in.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files_of(path):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"is not a whole safetensors file: {error}", location=str(file), hint="get the file anew"
            ) from None
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise InputError(
                f"{name} is {str(value.dtype).removeprefix('torch.')}",
                location=str(path),
                hint="give fp16, bf16 or fp32 weights",
            )
    return tensors


def check_tensor_count(count: int, path: Path) -> None:
    """Raises `InputError` where a file has more tensors than any adapter, before one of them is looked at."""
    if count > MAX_TENSORS:
        raise InputError(
            f"holds {count:,} tensors, and an adapter at most {MAX_TENSORS:,}",
            location=str(path),
            hint="give an adapter: this is another file",
        )


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, all of them below its folder.

    Raises:
        InputError: it is no index, or a name leads out of the folder.
    """
    try:
        names = sorted(set(read_object(index, what="index of shards")["weight_map"].values()))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"is no index of shards: {error!r}", location=str(index)) from None
    for name in names:
        inside(index.parent, name, location=str(index), what="shard")
    return names


def _files_of(path: Path) -> list[Path]:
    """The safetensors files that `path` stands for."""
    if path.suffix in PICKLES:
        raise InputError("is a pickle, which may run code", location=str(path), hint="convert it to safetensors first")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            "no such file or folder", location=str(path), hint="give a safetensors file or a diffusers folder"
        )
    # A folder may hold a second set in another precision (`name.fp16.safetensors`): the one without is the default, as in
    # diffusers.
    if indices := sorted(path.glob("*.safetensors.index.json"), key=lambda file: (file.name.count("."), file.name)):
        names = shard_names(indices[0])
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:8])}", location=str(path)
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1] or files
    if len(plain) == 1:
        return plain
    if not files and any(file.suffix in PICKLES for file in path.iterdir()):
        raise InputError("holds pickles only, which may run code", location=str(path), hint="get the safetensors files")
    what = "no safetensors file" if not files else f"{len(files)} safetensors files and no index"
    raise InputError(f"holds {what}", location=str(path), hint="give the file itself, or the folder with its index")


# What a stored config may say of a size of the model: beyond these nothing is built, or without end.
_SIZES = {
    "num_layers": Range(1, 1000, whole=True),
    "num_single_layers": Range(0, 1000, whole=True),
    "num_attention_heads": Range(1, 1000, whole=True),
    "attention_head_dim": Range(1, 10_000, whole=True),
    "patch_size": Range(1, 1000, whole=True),
    "in_channels": Range(1, 100_000, whole=True),
}


def check_sizes(config: Mapping[str, Any], *, location: str) -> None:
    """Raises `InputError`: a size of the model is out of range in a stored config; `location` is the base."""
    for key, numbers in _SIZES.items():
        if key in config:
            numbers.check(config[key], location=f"{location}: {key} of its transformer's config")


def refuse_pickle(safe: bool, location: str) -> None:
    """Refuse to read or write weights as a pickle.

    Raises:
        InputError: not `safe`.
    """
    if not safe:
        raise InputError(
            "would be a pickle, which may run code when it is opened",
            location=location,
            hint="leave use_safetensors and safe_serialization out: only safetensors are read and written",
        )


def refuse_pickled_weights(folder: Path) -> None:
    """Refuse a part of a base whose weights are there as a pickle alone. A folder that is not here is let through.

    Raises:
        InputError: it is one.
    """
    if not folder.is_dir():
        return
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"its weights are a pickle ({listed(pickles)}), which may run code when it is opened",
            location=str(folder),
            hint="get them as .safetensors: many repositories hold both",
        )


def strip_local_paths(folder: str | Path) -> None:
    """Take the paths of this machine out of the configs of a folder that was saved: diffusers writes where a part was opened."""
    for file in (*Path(folder).glob("*.json"), *Path(folder).glob("*/*.json")):
        if file.name not in ("config.json", INDEX, MODULAR_INDEX):
            continue
        config = read_object(file)
        if file.name == MODULAR_INDEX:  # diffusers looks for a part in the folder itself first
            sources = [value[2] for value in config.values() if isinstance(value, list) and isinstance(value[-1], dict)]
            for source in sources:
                source["pretrained_model_name_or_path"] = public_name(source["pretrained_model_name_or_path"])
            write_json(file, config)
        origin = config.get("_name_or_path")
        if isinstance(origin, str) and public_name(origin) != origin:
            del config["_name_or_path"]
            write_json(file, config)


def opened_from(location: str | Path, subfolder: str | None = None) -> Path | None:
    """The folder that something is opened from, whatever the current directory is later; None for a hub id."""
    return Path(location, subfolder or "").resolve() if exists(location) else None
