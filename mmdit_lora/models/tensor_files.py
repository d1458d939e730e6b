"""Safetensors on disk: the tensors of a file, or of a folder of shards, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.files import inside
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


def refuse_many(count: int, path: Path) -> None:
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
