"""Safetensors on disk, a file or a folder of shards, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.files import inside
from mmdit_lora.json_files import read_object

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_TENSORS = 20_000  # ten times those of an adapter for every linear of the largest base


class TensorFiles:
    """The tensors of one safetensors file, or of a folder of shards, read one at a time.

    Raises:
        InputError: no such file, a pickle, a damaged file, or a shard that the index names is missing.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        for file in _files_of(path):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"is not a whole safetensors file: {error}", location=str(file), hint="get the file anew"
                ) from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> set[str]:
        return set(self._files)

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU, as stored."""
        return self._files[name].get_tensor(name)

    def empty(self, name: str) -> Tensor:
        """Shape and dtype of the tensor, on the meta device.

        Raises:
            InputError: its dtype is not a floating-point one that a transformer is stored in.
        """
        piece = self._files[name].get_slice(name)
        if piece.get_dtype() not in _DTYPES:
            raise InputError(
                f"{name} is {piece.get_dtype()}", location=str(self.path), hint="give fp16, bf16 or fp32 weights"
            )
        return torch.empty(piece.get_shape(), dtype=_DTYPES[piece.get_dtype()], device="meta")


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
    if path.suffix in _PICKLES:
        raise InputError("is a pickle, which may run code", location=str(path), hint="convert it to safetensors first")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(
            "no such file or folder", location=str(path), hint="give a safetensors file or a diffusers folder"
        )
    # A folder may hold a second set in another precision (`name.fp16.safetensors`): the one without is the default, as in
    # diffusers.
    indices = _by_dots(path.glob("*.safetensors.index.json"))
    if indices:
        names = shard_names(indices[0])
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:8])}", location=str(path)
            )
        return [path / name for name in names]
    files = _by_dots(path.glob("*.safetensors"))
    if len(files) == 1 or (len(files) > 1 and _is_variant_of(files[1:], files[0])):
        return files[:1]
    if not files and any(file.suffix in _PICKLES for file in path.iterdir()):
        raise InputError("holds pickles only, which may run code", location=str(path), hint="get the safetensors files")
    what = "no safetensors file" if not files else f"{len(files)} safetensors files and no index"
    raise InputError(f"holds {what}", location=str(path), hint="give the file itself, or the folder with its index")


def _by_dots(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda file: (file.name.count("."), file.name))


def _is_variant_of(files: Iterable[Path], plain: Path) -> bool:
    """Whether all are `stem.VARIANT.safetensors` of `stem.safetensors`."""
    return all(file.name.count(".") == 2 and file.name.startswith(f"{plain.stem}.") for file in files)
