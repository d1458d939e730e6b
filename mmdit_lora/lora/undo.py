"""Taking an adapter off again that could not be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmdit_lora.models.adapter_layers import adapter_layers


class Undo:
    """What a load may change of models, to bring it back after one that failed half-way: no layer or name of it is left."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.active = {layer: list(layer.active_adapters) for model in models for _, layer in adapter_layers(model)}
        self.disabled = {layer: layer.disable_adapters for layer in self.active}
        self.trained = {p: p.requires_grad for model in models for p in model.parameters()}

    def __call__(self, adapter_name: str) -> None:
        """Take `adapter_name` off again."""
        for model in self.models:
            for name, layer in adapter_layers(model):
                layer.delete_adapter(adapter_name)
                if layer in self.active:
                    layer.set_adapter(self.active[layer])
                    layer.enable_adapters(not self.disabled[layer])
                else:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.get_base_layer())
            configs: Any = getattr(model, "peft_config", None)
            if configs is not None:
                configs.pop(adapter_name, None)
                if not configs:
                    del model.peft_config
                    model._hf_peft_config_loaded = False  # type: ignore[assignment]
        for parameter, trained in self.trained.items():
            parameter.requires_grad_(trained)
