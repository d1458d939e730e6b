"""What a plan needs to know of a base: the config of its transformer. No weight is read or fetched."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download

from mmdit_lora.errors import InputError
from mmdit_lora.hub import read_base_config
from mmdit_lora.models import FAMILIES, Family, LayoutModelMixin, family_of
from mmdit_lora.models.families import stream_changes
from mmdit_lora.models.generic_stream import add_layout_stream
from mmdit_lora.models.stream_families import STREAM_FAMILIES, StreamFamily
from mmdit_lora.models.weight_files import check_sizes

DEFAULT_SIDE = 1024
_HINT = "give a pipeline folder, its transformer folder, a hub id, or a --family without a base"
# Options of a new layout stream: key of the transformer -> option of the command line.
STREAM_OPTIONS = {
    "layout_attention": "--attention",
    "layout_single_blocks": "--single-blocks",
    "phrase_tokens": "--phrase-tokens",
    "layout_width": "--stream-width",
}


@dataclass(frozen=True)
class PlannedBase:
    """A base by its config.

    Args:
        name: preset, folder or hub id.
        family: with a built-in layout stream, or for a generic one.
        arguments: of the family's transformer.
        vae_scale_factor: pixels that a latent cell covers, along a side.
        stream: of a generic stream, the arguments of `add_layout_stream`.
    """

    name: str
    family: Family | StreamFamily
    arguments: Mapping[str, Any]
    vae_scale_factor: int
    stream: Mapping[str, Any] | None = None

    @property
    def transformer(self) -> type[Any]:
        """The class that is made."""
        family = self.family
        return getattr(diffusers, family.transformer) if isinstance(family, StreamFamily) else family.transformer

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
            model = self.transformer(**self.arguments)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"its transformer's config makes no model: {error}", location=self.name) from error
        if self.stream is not None:
            try:
                add_layout_stream(model, **self.stream)
            except ValueError as error:
                raise InputError(str(error), location="--stream-width") from None
        return model

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
    """A published checkpoint by its name, e.g. "sd3-medium": with a built-in stream where its family has one.

    Args:
        options: of the layout stream, keys of `STREAM_OPTIONS`; None = the default. A width asks for a generic stream.

    Raises:
        InputError: no such preset (the nearest is named), or its family knows no such option.
    """
    built_in = {name: family for family in FAMILIES.values() for name in family.presets}
    generic = {name: family for family in STREAM_FAMILIES.values() for name in family.presets}
    if preset not in generic:
        near = difflib.get_close_matches(preset, generic, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(generic)}"
        raise InputError(f"is {preset!r}, which is not known", location="--family", hint=hint)
    if preset in built_in and options.get("layout_width") is None:
        return _built_in(preset, built_in[preset], built_in[preset].presets[preset], options, has_stream=False)
    return _generic(preset, generic[preset], generic[preset].presets[preset], options)


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
    stock = next((f for f in STREAM_FAMILIES.values() if f.transformer == config.get("_class_name")), None)
    built_in = stock is not None and any(f.stock_class == stock.transformer for f in FAMILIES.values())
    if stock is not None and (not built_in or options.get("layout_width") is not None):
        check_sizes(config, location=base)
        planned = _generic(base, stock, config, options)
    else:
        family = family_of(config, location=base)
        has_stream = config["_class_name"] == family.transformer.__name__
        planned = _built_in(base, family, config, options, has_stream=has_stream)
    vae = folder / "vae" / "config.json"
    stages = read_base_config(vae).get("block_out_channels") if vae.is_file() else None
    # As diffusers' pipelines compute it.
    return replace(planned, vae_scale_factor=2 ** (len(stages) - 1)) if isinstance(stages, list) and stages else planned


def _built_in(
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


def _generic(base: str, family: StreamFamily, config: Mapping[str, Any], options: Mapping[str, Any]) -> PlannedBase:
    chosen = {key: value for key, value in options.items() if value is not None}
    for key in chosen.keys() - {"layout_attention", "layout_width"}:
        what = f"is {chosen[key]}, and the generic stream of {base} has no such choice"
        raise InputError(what, location=STREAM_OPTIONS[key], hint="leave it out")
    known = inspect.signature(getattr(diffusers, family.transformer).__init__).parameters
    stream = {key.removeprefix("layout_"): value for key, value in chosen.items()}
    arguments = {key: value for key, value in config.items() if key in known}
    return PlannedBase(base, family, arguments, family.vae_scale_factor, stream)
