"""A generic layout stream as files of its own: `layout_stream.safetensors` and `config.json`, never a copy of the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit_lora.errors import InputError, counted
from mmdit_lora.files import exists, public_name, write_json
from mmdit_lora.json_files import read_object
from mmdit_lora.models.fingerprint import base_fingerprint as fingerprint_of
from mmdit_lora.models.generic_stream import (
    LayoutStreamReport,
    StreamModel,
    add_layout_stream,
    remove_layout_stream,
    stream_config,
    stream_parameters,
)
from mmdit_lora.models.stream_families import family_of_class
from mmdit_lora.models.weight_files import load_tensors
from mmdit_lora.outputs import new_folder

WEIGHTS, CONFIG = "layout_stream.safetensors", "config.json"
FORMAT = 1


def save_layout_stream(
    transformer: nn.Module,
    folder: str | Path,
    *,
    base: str | None = None,
    base_fingerprint: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    verb: str = "save_layout_stream",
) -> None:
    """Write the stream of a model to a folder, all or nothing. Adapters that are on it are left out.

    Args:
        base: folder or hub id of the model, for people. base_fingerprint: of the stock model, where the caller has it already, or
            the model is quantised and so another. weights: to be saved in place of the model's, by name.

    Raises:
        ValueError: the model has no stream that `add_layout_stream` made.
        InputError: the folder cannot be written, or holds something else.
    """
    if not isinstance(transformer, StreamModel):
        raise ValueError(f"this {type(transformer).__name__} has no layout stream of its own files")
    named = {name.replace(".base_layer.", "."): p for name, p in stream_parameters(transformer).items()}
    tensors = {name: (weights or named).get(name, value).detach().cpu().contiguous() for name, value in named.items()}
    config = {
        "format": FORMAT,
        "family": transformer.stream_family.name,
        "attention": transformer.stream_config.attention,
        "width": transformer.stream_config.width,
        "base": None if base is None else public_name(base),
        "base_fingerprint": base_fingerprint or fingerprint_of(transformer, with_stream=False),
        "parameters": sum(value.numel() for value in tensors.values()),
    }
    with new_folder(folder, verb=verb) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"mmdit_lora": json.dumps(config, sort_keys=True)})
        write_json(temporary / CONFIG, config)


def read_stream_config(folder: str | Path) -> dict[str, Any]:
    """What `config.json` of a saved stream says, its values of the right types.

    Raises:
        InputError: the folder holds no layout stream, or one of a later version.
    """
    path = Path(folder)
    if not exists(path / CONFIG) or not exists(path / WEIGHTS):
        raise InputError(
            f"no layout stream: {CONFIG} and {WEIGHTS} are expected",
            location=str(folder),
            hint="give the folder that `train` with `method: layout_stream` or save_layout_stream wrote",
        )
    try:
        config = read_object(path / CONFIG)
        if config.get("format") != FORMAT:
            raise ValueError(f"format is {config.get('format')!r}, and this mmdit-lora knows {FORMAT}")
        for key, kind in (("family", str), ("attention", str), ("width", int), ("base_fingerprint", str)):
            if type(config.get(key)) is not kind:
                raise ValueError(f"{key} is {config.get(key)!r}")
    except ValueError as error:
        raise InputError(f"is no config of a layout stream: {error}", location=str(path / CONFIG)) from None
    return config


def load_layout_stream(
    transformer: nn.Module, folder: str | Path, *, check_base: bool = True, dtype: torch.dtype | None = None
) -> LayoutStreamReport:
    """Give a stock transformer the stream of a folder that `save_layout_stream` wrote.

    Args:
        transformer: changed in place; where loading fails, it is as it was.
        check_base: its weights must be those that the stream was trained on. Without, any base of the same sizes will do,
            such as a fine-tuned one.
        dtype: of the stream's weights; None = the transformer's.

    Raises:
        InputError: the folder holds no stream, or one of another family, base, width, or with other weights than its config
            says.
    """
    config, location = read_stream_config(folder), str(folder)
    tensors = load_tensors(Path(folder) / WEIGHTS)
    model: Any = transformer
    try:
        family = family_of_class(type(transformer).__name__)
        if config["family"] != family.name:
            raise ValueError(f"is of the family {config['family']}, and this transformer of {family.name}")
        # Before a model is built: a config may state any width.
        stream_config(model.config, attention=config["attention"], width=config["width"])
        gates = [value.shape for name, value in tensors.items() if name.endswith("layout_stream.out_proj.weight")]
        if wrong := [shape for shape in gates if tuple(shape) != (family.width(model.config), config["width"])]:
            expected = (family.width(model.config), config["width"])
            raise ValueError(f"has gates of another shape, {tuple(wrong[0])}: this base and its width make {expected}")
        report = add_layout_stream(transformer, attention=config["attention"], width=config["width"])
    except ValueError as error:
        raise InputError(str(error), location=location, hint="give a stream that was trained on this base") from None
    try:
        own = stream_parameters(transformer)
        faults = {
            "missing": sorted(own.keys() - tensors.keys()),
            "unexpected": sorted(tensors.keys() - own.keys()),
            "of another shape": [
                name for name in sorted(own.keys() & tensors.keys()) if own[name].shape != tensors[name].shape
            ],
        }
        if any(faults.values()):
            raise InputError(f"does not fit this base: {counted(faults)}", location=location)
        if check_base and config["base_fingerprint"] != fingerprint_of(transformer, with_stream=False):
            raise InputError(
                f"was trained on another base ({config.get('base') or 'not named'}, {config['base_fingerprint'][:12]})",
                location=location,
                hint="give that base; in Python, load_layout_stream(..., check_base=False) takes any of the same sizes",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.data = tensors[name].to(parameter.device, dtype or parameter.dtype)
    except BaseException:
        remove_layout_stream(transformer)
        raise
    return report
