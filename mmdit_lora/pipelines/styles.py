"""Loading style LoRAs of other tools into a pipeline, beside its layout adapters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import peft
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.peft_utils import delete_adapter_layers
from torch import nn
from transformers import PreTrainedModel

from mmdit_lora.config.ranges import ADAPTER_WEIGHT
from mmdit_lora.errors import InputError, clip, listed
from mmdit_lora.files import exists
from mmdit_lora.lora import (
    adapter_file,
    is_layout_adapter,
    is_layout_adapter_file,
    keep_active,
    load_adapter,
    same_adapter,
)
from mmdit_lora.lora.inject import AdapterRollback
from mmdit_lora.lora.style import StylePart, StyleReport, read_style
from mmdit_lora.lora.style_files import fetch_style
from mmdit_lora.lora.style_names import FamilyNames
from mmdit_lora.models.adapter_layers import (
    activate_adapters,
    check_adapter_name,
    check_fusing,
    chosen_adapters,
    match_training_mode,
    reenable_adapters,
    refuse_fused,
    refuse_wrapped,
    scaled_adapters,
)

logger = logging.getLogger("mmdit_lora")


class StyleLoader:
    """Mixed into a diffusers pipeline, in front of it: `load_lora_weights` reads the files of every tool exactly.

    diffusers' own leaves T5 alone; here every text encoder may carry LoRA.
    """

    style_names: ClassVar[FamilyNames]
    _lora_loadable_modules: ClassVar[list[str]]
    _optionally_disable_offloading: Callable[[Any], tuple[bool, bool, bool]]

    transformer: Any
    components: Any
    enable_model_cpu_offload: Callable[[], None]
    enable_sequential_cpu_offload: Callable[[], None]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> StyleReport:
        """Load a style LoRA of any tool that `mmdit_lora.lora.style` reads, the exact change of every weight or a refusal; or a
        layout adapter in any form that `export` writes, as `load_adapter` does.

            pipe.load_lora_weights("style.safetensors", adapter_name="style")
            pipe.set_adapters(["default", "style"], [1.0, 0.6])

        A style acts on the transformer and on every text encoder that the base has, T5 too. Layout adapters that are active
        stay active beside it (with diffusers' own, they would be switched off). After `disable_lora` it acts alone: the others
        stay off, until `set_adapters` names them.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a hub id, or tensors by key. Only safetensors are read.
            adapter_name: a new one; by default "default_<number>".
            hotswap: put the weights in place of those of the adapter `adapter_name`, as diffusers does.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, ... as of diffusers.

        Returns:
            What was used and what left out; both are logged, the latter as a warning.

        Raises:
            InputError: see `read_style`, `fetch_style` and `load_adapter`; the name cannot be one, or is taken; an adapter is
                fused into the weights of a model that the file changes; a model is wrapped in a `PeftModel`; or the file is on
                the pipeline already, under another name. Everything is then as it was.
        """
        kwargs.pop("use_safetensors", None)
        low_memory = kwargs.pop("low_cpu_mem_usage", True)
        source = pretrained_model_name_or_path_or_dict
        location = clip(source, 300) if isinstance(source, str | Path) else None
        components = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        adapter_name = self._new_adapter_name(adapter_name, components, hotswap=hotswap)
        if not hotswap and (file := layout_adapter_file(source, kwargs)) is not None:
            stored = load_adapter(self.transformer, file, adapter_name=adapter_name)
            self._reenable_adapters()
            size = 4 * sum(tensor.numel() for tensor in stored.tensors.values())
            return StyleReport(adapter_name, used={"transformer": stored.modules}, bytes=size)
        state, metadata = fetch_style(source, **kwargs)
        try:
            parts, ignored, full_rank = read_style(state, components, self.style_names, metadata=metadata)
            if hotswap and set(parts) != {"transformer"}:
                raise InputError("hotswap works on the transformer alone, and the file has other parts")
            refuse_fused(*(components[name] for name in parts))  # type: ignore[arg-type]
        except InputError as error:
            raise (error.at(location) if location else error) from None
        offloading = self._optionally_disable_offloading(self)
        undo = AdapterRollback([model for model in components.values() if model is not None])
        try:
            for component, part in parts.items():
                self._load_part(
                    components[component], part, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_memory
                )
            if not hotswap:
                self._reenable_adapters()
                twins = {same_adapter(components[name], adapter_name) for name in parts}  # type: ignore[arg-type]
                if len(twins) == 1 and (twin := twins.pop()) is not None:
                    raise InputError(
                        f"is loaded already, as {twin!r}: it would act twice",
                        location=location,
                        hint=f"give it once, with a larger weight: pipe.set_adapters({twin!r}, 2.0)",
                    )
        except Exception:
            if not hotswap:
                undo(adapter_name)
            raise
        finally:
            self._restore_offloading(*offloading)
        report = StyleReport(
            adapter_name,
            used={name: [str(module) for module in part.config["target_modules"]] for name, part in parts.items()},
            ignored=ignored,
            full_rank=full_rank,
            bytes=sum(4 * tensor.numel() for part in parts.values() for tensor in part.state.values()),
        )
        logger.log(logging.WARNING if ignored else logging.INFO, "%s%s", f"{location}: " if location else "", report)
        return report

    def _load_part(
        self, model: Any, part: StylePart, adapter_name: str, *, hotswap: bool, low_cpu_mem_usage: bool
    ) -> None:
        stay = [name for name in getattr(model, "peft_config", {}) if hotswap or is_layout_adapter(model, name)]
        with keep_active(model, stay.__contains__), warnings.catch_warnings():
            # A target such as "proj_out" would fit other modules' ends too; the tensors' names decide.
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters, an inconsistency")
            if model is self.transformer:
                model.load_lora_adapter(
                    part.state,
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=part.config,
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
            else:  # diffusers' own loader of text encoders knows the names of CLIP alone
                config = peft.LoraConfig(**part.config)
                options = {"low_cpu_mem_usage": low_cpu_mem_usage}
                peft.inject_adapter_in_model(config, model, adapter_name, state_dict=part.state, **options)
                peft.set_peft_model_state_dict(model, part.state, adapter_name, **options)
                model._hf_peft_config_loaded = True
        match_training_mode(model)

    def _new_adapter_name(self, name: str | None, components: Mapping[str, Any], *, hotswap: bool) -> str:
        for component, model in components.items():
            refuse_wrapped(model, f"pipe.{component}")
        taken = {taken for model in components.values() for taken in getattr(model, "peft_config", {})}
        if name is None:
            return next(free for free in map("default_{}".format, range(len(taken) + 1)) if free not in taken)
        check_adapter_name(name)
        if (name in taken) != hotswap:
            raise InputError(
                f"there is {'no' if hotswap else 'an'} adapter {clip(repr(name))}{'' if hotswap else ' already'}",
                hint="give the name of one that is there" if hotswap else "give the new one another name",
            )
        return name

    def _restore_offloading(self, model: bool, sequential: bool, group: bool) -> None:
        """As diffusers' loaders do after `_optionally_disable_offloading`."""
        if model:
            self.enable_model_cpu_offload()
        elif sequential:
            self.enable_sequential_cpu_offload()
        elif group:
            for component in self.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)

    # -- the adapters of all components together

    def _adapted(self, components: Sequence[str] | None = None) -> dict[str, Any]:
        """The components, of all or of these, that carry adapters."""
        known = self._lora_loadable_modules
        given = [components] if isinstance(components, str) else list(components or known)
        if unknown := [name for name in given if name not in known]:
            raise InputError(
                f"{listed(map(repr, unknown))} carries no LoRA", location="components", hint=f"known: {listed(known)}"
            )
        models = {name: getattr(self, name, None) for name in given}
        return {
            name: model
            for name, model in models.items()
            if isinstance(model, ModelMixin | PreTrainedModel) and getattr(model, "peft_config", None)
        }

    def _text_encoders(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._lora_loadable_modules if name != "transformer"]

    def _reenable_adapters(self) -> None:
        for model in self._adapted().values():
            reenable_adapters(model, stay_off=True)

    def set_adapters(self, adapter_names: Any, adapter_weights: Any = None) -> None:
        """As diffusers'; after `disable_lora`, too, those that are named act.

        Args:
            adapter_weights: one for all, or one for each: a number, None for 1, or such by component, where numbers by part
                of a module's name may stand for one number.

        Raises:
            InputError: a weight is no number in `ranges.ADAPTER_WEIGHT`, its component or block is none of the pipeline's; no
                name is given, or one twice, or one that is not loaded; or an adapter is fused into the weights.
        """
        activate_adapters(self._adapted(), adapter_names, adapter_weights, components=self._lora_loadable_modules)

    def delete_adapters(self, adapter_names: Any) -> None:
        """As diffusers'.

        Raises:
            InputError: a name is not loaded, or is fused into the weights, where it would stay.
        """
        models = self._adapted()
        names = chosen_adapters(adapter_names, {name for model in models.values() for name in model.peft_config})
        refuse_fused(*models.values(), names=names)
        for model in models.values():
            there = [name for name in names if name in model.peft_config]
            if there and isinstance(model, ModelMixin):
                model.delete_adapters(there)
            elif there:
                for name in there:
                    delete_adapter_layers(model, name)

    def set_lora_device(self, adapter_names: Any, device: Any) -> None:
        """As diffusers'.

        Raises:
            InputError: a name is not loaded.
        """
        stock: Any = super()
        loaded = {name for model in self._adapted().values() for name in model.peft_config}
        stock.set_lora_device(chosen_adapters(adapter_names, loaded), device)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Any = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers'; by default in all components that may carry LoRA, T5 too. While it is fused, no adapter can be loaded,
        chosen or deleted; `unload_lora_weights` then leaves it in the weights for good.

        Raises:
            InputError: `lora_scale` is no number in `ranges.ADAPTER_WEIGHT`, a name is not loaded, a component carries no LoRA,
                or another scale than 1 is given where an adapter is fused already.
        """
        stock: Any = super()
        models = self._adapted(components)
        names = check_fusing(*models.values(), scale=lora_scale, names=adapter_names)
        for component, model in models.items():
            there = None if names is None else [name for name in names if name in model.peft_config]
            if there != []:
                stock.fuse_lora([component], lora_scale, safe_fusing, there, **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """As diffusers'; by default in all components that may carry LoRA, T5 too."""
        stock: Any = super()
        stock.unfuse_lora(components=list(components or self._lora_loadable_modules), **kwargs)

    def encode_prompt(self, *args: Any, lora_scale: float | None = None, **kwargs: Any) -> Any:
        """As diffusers'; `lora_scale` acts on all text encoders, T5 too.

        Raises:
            InputError: it is no number in `ranges.ADAPTER_WEIGHT`.
        """
        stock: Any = super()
        if lora_scale is not None:
            self._lora_scale = ADAPTER_WEIGHT.check(lora_scale, "lora_scale")
        with scaled_adapters(lora_scale, *self._text_encoders()):
            return stock.encode_prompt(*args, **kwargs)


def layout_adapter_file(source: Any, options: Mapping[str, Any]) -> Path | None:
    """The file of a layout adapter that `load_lora_weights` is asked for; None for anything else."""
    if not isinstance(source, str | Path) or not exists(source):
        return None
    path = Path(source, options.get("subfolder") or "")
    with suppress(InputError):  # what is no adapter is for the reader of style LoRAs to refuse
        file = adapter_file(path / options["weight_name"] if options.get("weight_name") else path)
        if is_layout_adapter_file(file):
            return file
    return None
