"""PEFT's layers on a model: which adapters act on them and how strongly, their mode, and the model without them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmdit_lora.config.ranges import ADAPTER_WEIGHT, check_adapter_weights
from mmdit_lora.errors import InputError, clip, listed
from mmdit_lora.files import output_path
from mmdit_lora.models.weight_files import refuse_pickle

logger = logging.getLogger("mmdit_lora")


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT put around linears, by module name, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules below it, by name, as if no adapter were on it."""
    inside = None
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
            yield name, module.get_base_layer()
        else:
            yield name, module


def check_adapter_name(name: Any) -> str:
    """`name`, which PEFT can give to an adapter: it becomes the name of a module.

    Raises:
        InputError: it is no text, is empty, holds a dot, or is what torch's containers call something of their own.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise InputError(
            f"is {clip(repr(name), 100)}", location="adapter_name", hint="give a text without dots, such as 'style'"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise InputError(
            f"is {name!r}, a name that torch uses itself", location="adapter_name", hint="give another name"
        )
    return name


def chosen_adapters(names: Any, loaded: Iterable[str]) -> list[str]:
    """`names`, one or several, each of which is loaded.

    Raises:
        InputError: none is given, one is given twice, or one is not loaded; it lists those that are.
    """
    loaded = sorted(set(loaded))
    hint = f"loaded: {listed(loaded) or 'none'}"
    given = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
    if not given:
        raise InputError(
            "no adapter is named", location="adapter_names", hint=f"{hint}; `disable_lora()` switches all off"
        )
    for name in given:
        if name not in loaded:
            raise InputError("no such adapter", location=clip(repr(name), 100), hint=hint)
        if given.count(name) > 1:
            raise InputError(
                "is named twice", location=clip(repr(name), 100), hint="name it once, with its whole weight"
            )
    return given


def fused_adapters(*models: nn.Module) -> list[str]:
    """Names of the adapters that `fuse_lora` has added into the weights, and whose layers are still there."""
    return sorted({name for model in models for _, layer in adapter_layers(model) for name in layer.merged_adapters})


def refuse_fused(*models: nn.Module, names: Sequence[str] | None = None) -> None:
    """Refuse to change adapters of a model that has some fused. PEFT would leave a removed one in the weights, would not run
    a new one on the modules that carry a fused one, and would take a fused one off again by a weight that it has not got.

    Args:
        names: refuse only where one of these is fused.

    Raises:
        InputError: one is.
    """
    fused = [name for name in fused_adapters(*models) if names is None or name in names]
    if fused:
        raise InputError(
            f"fused into the weights: {listed(fused)}",
            hint="call `unfuse_lora()` first; to keep it in the weights for good, `unload_lora_weights()`",
        )


def refuse_wrapped(model: Any, location: str = "model") -> None:
    """Refuse a `PeftModel`, whose modules have other names than the model's, and what is no model.

    Args:
        location: how the user reaches it, e.g. "pipe.transformer".

    Raises:
        InputError: it is one.
    """
    if model is not None and not isinstance(model, nn.Module):  # None: a part that the base does not have
        hint = "give its transformer: `pipe.transformer`" if hasattr(model, "transformer") else "give a transformer"
        raise InputError(f"is a {type(model).__name__}, and no model", location=location, hint=hint)
    if isinstance(model, PeftModel):
        raise InputError(
            f"is a PeftModel around a {type(model.get_base_model()).__name__}, which has adapters already: "
            f"{listed(model.peft_config)}",
            location=location,
            hint=f"take `{location}.get_base_model()` in its place: it keeps them",
        )


def activate_adapters(
    models: Mapping[str, Any], adapter_names: Any, adapter_weights: Any, *, components: Collection[str] | None = None
) -> None:
    """On all models these adapters act, and no others; layers that `disable_lora` has switched off are on again.

    Args:
        models: by component of the pipeline.
        adapter_weights: one for all adapters, or one for each: a number, None for 1, or numbers by part of a module's name, of
            which the first that fits counts; with `components`, any of these by component.
        components: that a pipeline may have adapters on. None = `models` is one model alone.

    Raises:
        InputError: a weight is no number in `ranges.ADAPTER_WEIGHT`, or its component or block is none of the models'; no name
            is given, or one twice, or one that is not loaded; or an adapter is fused into the weights.
    """
    check_adapter_weights(adapter_weights)
    loaded = sorted({name for model in models.values() for name in getattr(model, "peft_config", {})})
    names = chosen_adapters(adapter_names, loaded)
    each = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
    if len(each) != len(names):
        raise InputError(
            f"{len(each)} weights for {len(names)} adapters", location="set_adapters", hint="give one for each adapter"
        )
    weights = dict.fromkeys(models, each)
    if components is not None:
        for weight in each:
            if isinstance(weight, Mapping) and (unknown := weight.keys() - set(components)):
                raise InputError(
                    f"the weights name {listed(map(repr, unknown))}, which carries no LoRA",
                    location="adapter_weights",
                    hint=f"give weights by component, of {listed(components)}; loaded: {listed(loaded)}",
                )
        weights = {c: [w.get(c) if isinstance(w, Mapping) else w for w in each] for c in models}
    for component, model in models.items():
        keys = {key for weight in weights[component] if isinstance(weight, Mapping) for key in weight}
        modules = [name for name, _ in model.named_modules()] if keys else []
        for key in keys:
            if not isinstance(key, str) or not any(key in name for name in modules):
                raise InputError(
                    f"{clip(repr(key), 100)} is in the name of no module",
                    location="weights by block",
                    hint=f"give parts of names, such as those of {listed(name for name, _ in adapter_layers(model)[:2])}",
                )
    refuse_fused(*models.values())
    for component, model in models.items():
        layers = [name for name, _ in adapter_layers(model)]

        def by_module(weight: Mapping[str, Any], layers: Sequence[str] = layers) -> dict[str, float]:
            # diffusers fails on modules that no key fits, and takes a key for every name that holds it: longest first.
            found = {name: next((w for key, w in weight.items() if key in name), None) for name in layers}
            return {name: 1.0 if (w := found[name]) is None else w for name in sorted(found, key=len, reverse=True)}

        reenable_adapters(model)
        numbers = [by_module(w) if isinstance(w, Mapping) else 1.0 if w is None else w for w in weights[component]]
        set_weights_and_activate_adapters(model, list(names), numbers)


def reenable_adapters(model: nn.Module, *, stay_off: bool = False) -> None:
    """After `disable_lora`, let layers act again, each with its active adapters; or, if these are to stay off, with none.

    PEFT disables layers, not adapters: a new adapter would act only where no older one was.
    """
    for _, layer in adapter_layers(model):
        if layer.disable_adapters:
            trained = {p: p.requires_grad for p in layer.parameters()}
            if stay_off:
                layer.set_adapter([])
            layer.enable_adapters(True)
            for parameter, trains in trained.items():
                parameter.requires_grad_(trains)


@contextmanager
def scaled_adapters(scale: float | None, *models: nn.Module | None) -> Iterator[None]:
    """The active adapters at `scale` times their weights; afterwards exactly at their own.

    diffusers divides by the scale afterwards, which rounds, and after 0 sets 1 in place of what `set_adapters` had set.
    """
    layers: list[Any] = []
    if scale is not None and scale != 1:
        layers = [m for model in models if model is not None for m in model.modules() if isinstance(m, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def scaled_by_attention_kwargs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A transformer's `forward` during which its adapters are at `joint_attention_kwargs["scale"]` times their weights.

    As diffusers' `apply_lora_scale`, but for what `scaled_adapters` says.
    """

    @functools.wraps(forward)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        attention = dict(kwargs.get("joint_attention_kwargs") or {})
        scale = attention.pop("scale", None)
        if scale is None:
            return forward(self, *args, **kwargs)
        with scaled_adapters(scale, self):
            return forward(self, *args, **{**kwargs, "joint_attention_kwargs": attention})

    return called


def check_fusing(*models: nn.Module, scale: Any, names: Any) -> list[str] | None:
    """The adapters that `fuse_lora` is to fuse; None for those that are active.

    Raises:
        InputError: the scale is no number in `ranges.ADAPTER_WEIGHT`, a name is not loaded, or one is fused already and the
            scale is not 1: it would be taken off at another weight than it was added with.
    """
    ADAPTER_WEIGHT.check(scale, "lora_scale")
    if scale != 1:
        refuse_fused(*models)
    if names is None:
        return None
    return chosen_adapters(names, {name for model in models for name in getattr(model, "peft_config", {})})


def match_training_mode(model: nn.Module) -> None:
    """Put the layers of adapters into the model's mode. PEFT makes them in training mode, where they drop out."""
    for _, layer in adapter_layers(model):
        layer.train(model.training)


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each is in its own again."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def warn_of_adapters(location: str, *models: nn.Module) -> None:
    """One warning that the adapters on `models` are not part of the folder that is being saved."""
    names = sorted({name for model in models for name in getattr(model, "peft_config", {})})
    fused = any(layer.merged for model in models for _, layer in adapter_layers(model))
    logger.warning(
        "%s: the base is saved without its adapters (%s)%s. `save_pretrained(..., merge_adapters=True)` of the pipeline adds "
        "them into its weights; `save_adapter` writes them by themselves.",
        location,
        listed(names),
        ", but for what was fused into its weights" if fused else "",
    )


@contextmanager
def without_adapters(*models: nn.Module) -> Iterator[None]:
    """The models with their plain linears, under the names and with the weights of the base; afterwards as before.

    Nothing is copied. Adapters that are fused (`fuse_lora`) are in the weights of the base, and stay there.
    """
    with ExitStack() as undo:
        for model in models:
            layers = adapter_layers(model)
            for name, layer in layers:
                if any(name.startswith(f"{outer}.") for outer, _ in layers):
                    continue
                model.set_submodule(name, layer.get_base_layer())
                undo.callback(model.set_submodule, name, layer)
            if getattr(
                model, "_hf_peft_config_loaded", False
            ):  # transformers would save the adapter in place of the model
                stated: Any = model
                stated._hf_peft_config_loaded = False
                undo.callback(setattr, model, "_hf_peft_config_loaded", True)
        yield


class AdapterMethods(nn.Module):
    """Mixed into a diffusers transformer, in front of it: its adapter methods, without their silences."""

    fused_for_good: tuple[str, ...] = ()  # adapters that were fused when `unload_lora` took their layers off

    if TYPE_CHECKING:  # what the diffusers class brings; nn.Module's own answer, "Tensor | Module", fits nothing

        def __getattr__(self, name: str) -> Any: ...

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As diffusers': it acts alone, wholly, also after `disable_lora`. The new layers are in the model's mode (there, in
        training mode, where they drop out).

        Raises:
            InputError: the name cannot be one, or an adapter is fused into the weights.
        """
        check_adapter_name(adapter_name)
        refuse_fused(self)
        super().add_adapter(adapter_config, adapter_name)  # type: ignore[misc]
        reenable_adapters(self)
        match_training_mode(self)

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers', from safetensors only: it acts alone, wholly, also after `disable_lora`. The new layers are in the
        model's mode.

        Raises:
            InputError: a name is given that cannot be one, or an adapter is fused into the weights.
        """
        refuse_pickle(kwargs.get("use_safetensors", True) is not False, "load_lora_adapter")
        kwargs["use_safetensors"] = True
        if kwargs.get("adapter_name") is not None:
            check_adapter_name(kwargs["adapter_name"])
        refuse_fused(self)
        before = set(getattr(self, "peft_config", {}))
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)  # type: ignore[misc]
        if getattr(self, "peft_config", {}).keys() - before:
            reenable_adapters(self)
        match_training_mode(self)

    def set_adapters(self, adapter_names: Any, weights: Any = None) -> None:
        """As diffusers'; after `disable_lora`, too, those that are named act. See `activate_adapters`."""
        activate_adapters({"": self}, adapter_names, weights)

    def delete_adapters(self, adapter_names: Any) -> None:
        """As diffusers'.

        Raises:
            InputError: a name is not loaded, or is fused into the weights, where it would stay.
        """
        names = chosen_adapters(adapter_names, getattr(self, "peft_config", {}))
        refuse_fused(self, names=names)
        super().delete_adapters(names)  # type: ignore[misc]

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None) -> None:
        """As diffusers'.

        Raises:
            InputError: `lora_scale` is no number in `ranges.ADAPTER_WEIGHT`, a name is not loaded, or another scale than 1 is
                given where an adapter is fused already.
        """
        names = check_fusing(self, scale=lora_scale, names=adapter_names)
        super().fuse_lora(lora_scale, safe_fusing=safe_fusing, adapter_names=names)  # type: ignore[misc]

    def unload_lora(self) -> None:
        """As diffusers': adapters that are fused stay in the weights, on purpose."""
        self.fused_for_good = (*self.fused_for_good, *fused_adapters(self))
        super().unload_lora()  # type: ignore[misc]

    def save_lora_adapter(
        self, save_directory: Any, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As diffusers'.

        Raises:
            InputError: `safe_serialization` is False, which would write a pickle; or `save_directory` is no folder.
        """
        refuse_pickle(safe_serialization, str(save_directory))
        output_path(save_directory, folder=True)
        super().save_lora_adapter(save_directory, *args, safe_serialization=True, **kwargs)  # type: ignore[misc]
