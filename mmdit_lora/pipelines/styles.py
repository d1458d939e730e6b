"""Loading style LoRAs of other tools into a pipeline, beside its layout adapters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import peft
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import nn

from mmdit_lora.errors import InputError, clip
from mmdit_lora.lora import is_layout_adapter, keep_active
from mmdit_lora.lora.style import StylePart, StyleReport, Undo, read_style
from mmdit_lora.lora.style_files import fetch_style
from mmdit_lora.lora.style_names import FamilyNames
from mmdit_lora.models.adapter_layers import follow_mode

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
        """Load a LoRA file of any tool that `mmdit_lora.lora.style` reads: the exact change of every weight, or a refusal.

        It acts on the transformer and on every text encoder that the base has, T5 too. Layout adapters that are active stay
        active beside it (with diffusers' own, they would be switched off).

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a hub id, or tensors by key. Only safetensors are read.
            adapter_name: a new one; by default "default_<number>".
            hotswap: put the weights in place of those of the adapter `adapter_name`, as diffusers does.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, ... as of diffusers.

        Returns:
            What was used and what left out; both are logged, the latter as a warning.

        Raises:
            InputError: see `read_style` and `fetch_style`, or the name is taken. Everything is then as it was.
        """
        kwargs.pop("use_safetensors", None)
        low_memory = kwargs.pop("low_cpu_mem_usage", True)
        source = pretrained_model_name_or_path_or_dict
        where = clip(source, 300) if isinstance(source, str | Path) else None
        components = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        adapter_name = self._style_name(adapter_name, components, hotswap=hotswap)
        state, metadata = fetch_style(source, **kwargs)
        try:
            parts, ignored, full_rank = read_style(state, components, self.style_names, metadata=metadata)
            if hotswap and set(parts) != {"transformer"}:
                raise InputError("hotswap works on the transformer alone, and the file has other parts")
        except InputError as error:
            raise (error.at(where) if where else error) from None
        offloading = self._optionally_disable_offloading(self)
        undo = Undo([model for model in components.values() if model is not None])
        try:
            for component, part in parts.items():
                self._load_part(
                    components[component], part, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_memory
                )
        except Exception:
            if not hotswap:
                undo(adapter_name)
            raise
        finally:
            self._offload_again(*offloading)
        report = StyleReport(
            adapter_name,
            used={name: [str(module) for module in part.config["target_modules"]] for name, part in parts.items()},
            ignored=ignored,
            full_rank=full_rank,
            bytes=sum(4 * tensor.numel() for part in parts.values() for tensor in part.state.values()),
        )
        logger.log(logging.WARNING if ignored else logging.INFO, "%s%s", f"{where}: " if where else "", report)
        return report

    def _load_part(
        self, model: Any, part: StylePart, adapter_name: str, *, hotswap: bool, low_cpu_mem_usage: bool
    ) -> None:
        layout = [name for name in getattr(model, "peft_config", {}) if is_layout_adapter(model, name)]
        with keep_active(model, layout.__contains__), warnings.catch_warnings():
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
        follow_mode(model)

    def _style_name(self, name: str | None, components: Mapping[str, Any], *, hotswap: bool) -> str:
        taken = {taken for model in components.values() for taken in getattr(model, "peft_config", {})}
        if name is None:
            return next(free for free in map("default_{}".format, range(len(taken) + 1)) if free not in taken)
        if not name or "." in name:
            raise InputError(f"adapter_name is {clip(repr(name))}", cure="give a name without dots")
        if (name in taken) != hotswap:
            raise InputError(
                f"there is {'no' if hotswap else 'an'} adapter {clip(repr(name))}{'' if hotswap else ' already'}",
                cure="give the name of one that is there" if hotswap else "give the new one another name",
            )
        return name

    def _offload_again(self, model: bool, sequential: bool, group: bool) -> None:
        """As diffusers' loaders do after `_optionally_disable_offloading`."""
        if model:
            self.enable_model_cpu_offload()
        elif sequential:
            self.enable_sequential_cpu_offload()
        elif group:
            for component in self.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)

    def fuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """As diffusers'; by default in all components that may carry LoRA, T5 too."""
        stock: Any = super()
        stock.fuse_lora(components=list(components or self._lora_loadable_modules), **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """As diffusers'; by default in all components that may carry LoRA, T5 too."""
        stock: Any = super()
        stock.unfuse_lora(components=list(components or self._lora_loadable_modules), **kwargs)
