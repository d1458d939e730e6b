"""(IA)^3 on the layout stream, by PEFT: one learned factor for each output, or input, of a linear (arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from diffusers.training_utils import cast_training_params
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn

from mmdit_lora.config.loading import Config
from mmdit_lora.lora.inject import find_targets
from mmdit_lora.training.trainable import FoldedMethod

_INPUTS = "fc2"  # the factors of a feed-forward part stand behind its activation, so before its second linear


def ia3() -> FoldedMethod:
    """(IA)^3 at `lora.targets` of the config, for `train`."""
    return FoldedMethod("ia3", _add, fold_ia3)


def _add(model: nn.Module, config: Config) -> str:
    return f"a factor for each output or input of {add_ia3(model, config.lora.targets)['linears']} linears trains"


def add_ia3(model: nn.Module, targets: Sequence[str]) -> dict[str, Any]:
    """Freeze the model and give each target its factors, in fp32: of its inputs where its name ends with fc2, else of its
    outputs. At first they are 1.

    Returns:
        `linears`: how many got them.

    Raises:
        InputError: a target matches nothing, or no linear.
    """
    found = find_targets(model, peft.LoraConfig(target_modules=list(targets)))
    model.requires_grad_(False)
    config = peft.IA3Config(
        target_modules=list(targets), feedforward_modules=[name for name in targets if name.endswith(_INPUTS)]
    )
    transformer: Any = model
    transformer.add_adapter(config)
    cast_training_params(model, torch.float32)
    return {"linears": len(found)}


@torch.no_grad()
def fold_ia3(model: nn.Module) -> dict[str, Tensor]:
    """Multiply the factors into the plain linears, and take them off.

    Returns:
        Name of parameter -> its new value, fp32. Empty where the model has no factors.
    """
    changed: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, IA3Layer):
            layer: Any = module
            plain = layer.get_base_layer()
            dtype = plain.weight.dtype
            plain.float()
            layer.merge()
            changed |= {f"{name}.{key}": value.detach().clone() for key, value in plain.named_parameters()}
            plain.to(dtype)
            model.set_submodule(name, plain)
    if changed:
        transformer: Any = model
        del transformer.peft_config
        transformer._hf_peft_config_loaded = False
    return changed
