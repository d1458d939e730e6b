"""An exponential moving average of what trains, by diffusers' `EMAModel`; its weights in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.sharding import copy_full, full_tensor


class EMA:
    """The moving average of a model's trainable weights, in fp32.

    Args:
        decay: of the average; it starts lower and rises to it, (1 + step) / (10 + step), so that the first weights fade.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = trainable_parameters(model)
        spread = any(isinstance(p, DTensor) for p in self._parameters.values())  # PyTorch has no such kernel for parts
        self._ema = EMAModel(self._parameters.values(), decay=decay, foreach=not spread)

    def update(self) -> None:
        """After every optimizer step."""
        self._ema.step(self._parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; then its own again."""
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def copy_to_model(self) -> None:
        """Give the model the averaged weights for good."""
        self._ema.copy_to(self._parameters.values())

    def state(self) -> Callable[[Path], None]:
        """What writes averages by parameter name, and the number of updates; gathered now, where they are spread."""
        tensors = {n: full_tensor(shadow) for n, shadow in zip(self._parameters, self._ema.shadow_params, strict=True)}
        tensors["updates"] = torch.tensor(self._ema.optimization_step)
        return lambda path: save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Take back what `state` wrote.

        Raises:
            InputError: it is of other parameters.
        """
        tensors = load_file(path)
        self._ema.optimization_step = int(tensors.pop("updates"))
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in self._parameters.items()}:
            raise InputError("the moving average is of another set of parameters", location=str(path))
        for name, shadow in zip(self._parameters, self._ema.shadow_params, strict=True):
            copy_full(shadow, tensors[name])
