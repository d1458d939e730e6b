"""PEFT's layers on a model: the mode that they are in, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that PEFT put around linears, by module name, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def follow_mode(model: nn.Module) -> None:
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
                parent, _, child = name.rpartition(".")
                holder = model.get_submodule(parent)
                setattr(holder, child, layer.get_base_layer())
                undo.callback(setattr, holder, child, layer)
            if getattr(
                model, "_hf_peft_config_loaded", False
            ):  # transformers would save the adapter in place of the model
                stated: Any = model
                stated._hf_peft_config_loaded = False
                undo.callback(setattr, model, "_hf_peft_config_loaded", True)
        yield
