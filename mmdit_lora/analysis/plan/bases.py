"""What a plan needs to know of a base: the config of its transformer. No weight is read or fetched."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from mmdit_lora.errors import InputError
from mmdit_lora.hub import read_base_config
from mmdit_lora.models import FAMILIES, Family, LayoutModelMixin, family_of
from mmdit_lora.models.families import stream_changes

DEFAULT_SIDE = 1024
_HINT = "give a pipeline folder, its transformer folder, a hub id, or a --family without a base"
# Options of a new layout stream: key of the transformer -> option of the command line.
STREAM_OPTIONS = {
    "layout_attention": "--attention",
    "layout_single_blocks": "--single-blocks",
    "phrase_tokens": "--phrase-tokens",
}


@dataclass(frozen=True)
class PlannedBase:
    """A base by its config.

    Args:
        name: preset, folder or hub id.
        arguments: of the family's transformer.
        vae_scale_factor: pixels that a latent cell covers, along a side.
    """

    name: str
    family: Family
    arguments: Mapping[str, Any]
    vae_scale_factor: int

    @property
    def default_side(self) -> int:
        """Side in pixels of the images that the base was made for, as far as its config says so."""
        cells = self.arguments.get("sample_size")
        return cells * self.vae_scale_factor if isinstance(cells, int) else DEFAULT_SIDE

    def make(self) -> Any:
        """The transformer, on the default device.

        Raises:
            InputError: the config makes none.
        """
        try:
            return self.family.transformer(**self.arguments)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"its transformer's config makes no model: {error}", location=self.name) from error

    def latent_side(self, model: LayoutModelMixin, side: int) -> int:
        """Latent cells along the side of a square image of `side` pixels.

        Raises:
            InputError: no multiple of what an image token covers, or more than there are position embeddings for.
        """
        try:
            model.check_side(side, self.vae_scale_factor)
        except InputError as error:
            raise InputError(error.what, location="--resolution", hint=error.hint) from None
        return side // self.vae_scale_factor


def preset_base(preset: str, options: Mapping[str, Any]) -> PlannedBase:
    """A published checkpoint by its name, e.g. "sd3-medium".

    Args:
        options: of the layout stream, keys of `STREAM_OPTIONS`; None = the default.

    Raises:
        InputError: no such preset (the nearest is named), or its family knows no such option.
    """
    presets = {name: family for family in FAMILIES.values() for name in family.presets}
    if preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(presets)}"
        raise InputError(f"is {preset!r}, which is not known", location="--family", hint=hint)
    family = presets[preset]
    return _planned(preset, family, family.presets[preset], options, has_stream=False)


def load_base(base: str, options: Mapping[str, Any]) -> PlannedBase:
    """A base on disk (pipeline or transformer folder) or on the hub, of which only the transformer's config is fetched.

    Args:
        options: as in `preset_base`.

    Raises:
        InputError: no such base, no config, or one of another model; or the options contradict its layout stream.
    """
    folder = Path(base)
    if folder.exists():
        files = [file for file in (folder / "transformer" / "config.json", folder / "config.json") if file.is_file()]
        if not files:
            raise InputError("has neither transformer/config.json nor config.json", location=base, hint=_HINT)
        config = read_base_config(files[0])
    else:
        try:
            config = read_base_config(Path(hf_hub_download(base, "config.json", subfolder="transformer")))
        except InputError:
            raise
        except Exception as error:  # the hub's client and its HTTP library raise types of their own
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = f"is no folder, and as a hub id its transformer/config.json cannot be had ({first})"
            raise InputError(what, location=base, hint=_HINT) from error
    family = family_of(config, location=base)
    has_stream = config["_class_name"] == family.transformer.__name__
    planned = _planned(base, family, config, options, has_stream=has_stream)
    vae = folder / "vae" / "config.json"
    stages = read_base_config(vae).get("block_out_channels") if vae.is_file() else None
    # As diffusers' pipelines compute it.
    return replace(planned, vae_scale_factor=2 ** (len(stages) - 1)) if isinstance(stages, list) and stages else planned


def _planned(
    base: str, family: Family, config: Mapping[str, Any], options: Mapping[str, Any], *, has_stream: bool
) -> PlannedBase:
    known = inspect.signature(family.transformer.__init__).parameters
    arguments = {key: value for key, value in config.items() if key in known}
    changes = stream_changes(
        family.transformer,
        arguments,
        options,
        has_stream=has_stream,
        base=base,
        location=STREAM_OPTIONS,
        hint="leave it out",
    )
    return PlannedBase(base, family, arguments | changes, family.vae_scale_factor)
