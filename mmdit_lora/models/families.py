"""The model families: one table. Nothing outside this folder and the families' own files knows their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdit_lora.errors import InputError
from mmdit_lora.files import exists, written_as_path
from mmdit_lora.hub import no_such_base
from mmdit_lora.models import flux, sd3
from mmdit_lora.models.base import LayoutModelMixin
from mmdit_lora.models.flux import LayoutFluxTransformer2DModel
from mmdit_lora.models.sd3 import LayoutSD3Transformer2DModel
from mmdit_lora.models.weight_files import check_sizes
from mmdit_lora.resources import here_or_packaged


@dataclass(frozen=True)
class Family:
    """What the rest of the package may know of a model family; one value a family, collected in `FAMILIES`.

    Args:
        transformer: our class; its first diffusers base is the class that a plain base folder names.
        stock_class: name of that diffusers class, as in `transformer/config.json`.
        vae_scale_factor: pixels a latent cell covers, along a side, in the published checkpoints.
        max_length: length of the text sequence that the published pipelines give the transformer by default.
        presets: name of a published checkpoint -> the arguments of its transformer (its config.json).
    """

    transformer: type[LayoutModelMixin]
    stock_class: str
    vae_scale_factor: int
    max_length: int
    presets: Mapping[str, Mapping[str, Any]]


FAMILIES: dict[str, Family] = {
    "sd3": Family(
        LayoutSD3Transformer2DModel,
        stock_class="SD3Transformer2DModel",
        vae_scale_factor=8,
        max_length=77 + 256,  # CLIP and T5
        presets=sd3.PRESETS,
    ),
    "flux": Family(
        LayoutFluxTransformer2DModel,
        stock_class="FluxTransformer2DModel",
        vae_scale_factor=8,
        max_length=512,
        presets=flux.PRESETS,
    ),
}


def family_of(config: Mapping[str, Any], *, location: str) -> Family:
    """The family whose transformer a stored config describes, with a layout stream or plain.

    Raises:
        InputError: none, or a size of the model is out of range; `location` is the base that it belongs to.
    """
    name = config.get("_class_name")
    for family in FAMILIES.values():
        if name in (family.stock_class, family.transformer.__name__):
            check_sizes(config, location=location)
            return family
    known = ", ".join(family.stock_class for family in FAMILIES.values())
    raise InputError(f"its transformer is a {name}; known are {known}", location=location, hint="give a base of these")


def stream_changes(
    transformer: type[LayoutModelMixin],
    config: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    has_stream: bool,
    base: str,
    location: Mapping[str, str],
    hint: str,
    conflict_hint: str | None = None,
) -> dict[str, Any]:
    """Of options for the layout stream, those that change a base: all where it has no stream, none where it has one.

    Args:
        config: of its transformer, as stored.
        wanted: key of the transformer's config -> value; None = as it is.
        base: its name, for messages. location: key -> what the option is called there. hint: for an option that the family
            has not. conflict_hint: for one that contradicts the base's own stream; None = `hint`.

    Raises:
        InputError: the family knows no such option, or the base has another stream.
    """
    known = inspect.signature(transformer.__init__).parameters
    changes = {key: value for key, value in wanted.items() if value is not None}
    for key, value in changes.items():
        if key not in known:
            raise InputError(
                f"is {value}, and the family of {base} has no such choice", location=location[key], hint=hint
            )
        own = config.get(key, known[key].default)
        if has_stream and own != value:
            raise InputError(
                f"is {value}, and the layout stream of {base} has {'none' if own is None else own}",
                location=location[key],
                hint=conflict_hint or hint,
            )
    return {} if has_stream else changes


def stored_transformer(base: str) -> tuple[type[LayoutModelMixin], dict[str, Any]]:
    """Our class for the transformer of a base (folder or hub id), and its config as it is stored.

    Raises:
        InputError: there is no such transformer, or it is of no known family.
    """
    reader: Any = next(iter(FAMILIES.values())).transformer  # any will do: it reads the file as it is
    base = here_or_packaged(base)
    if not exists(base) and written_as_path(base):
        raise no_such_base(base)
    try:
        config = reader.load_config(base, subfolder="transformer")
    except OSError as error:
        if not exists(base):
            raise no_such_base(base) from error
        raise InputError(f"has no transformer/config.json: {error}", location=base) from error
    return family_of(config, location=base).transformer, config
