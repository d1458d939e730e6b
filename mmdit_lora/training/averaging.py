"""An exponential moving average of what trains, by diffusers' `EMAModel`; its weights in safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import trainable_parameters


class Averaged:
    """The moving average of a model's trainable weights, in fp32.

    Args:
        decay: of the average; it starts lower and rises to it, (1 + step) / (10 + step), so that the first weights fade.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = trainable_parameters(model)
        self._ema = EMAModel(self._parameters.values(), decay=decay, foreach=True)

    def update(self) -> None:
        """After every optimizer step."""
        self._ema.step(self._parameters.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; then its own again."""
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def put(self) -> None:
        """Give the model the averaged weights for good."""
        self._ema.copy_to(self._parameters.values())

    def save(self, path: Path) -> None:
        """Averages by parameter name, and the number of updates."""
        tensors = dict(zip(self._parameters, self._ema.shadow_params, strict=True))
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole | {"updates": torch.tensor(self._ema.optimization_step)}, path)

    def load(self, path: Path) -> None:
        """The inverse of `save`.

        Raises:
            InputError: it is of other parameters.
        """
        tensors = load_file(path)
        self._ema.optimization_step = int(tensors.pop("updates"))
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in self._parameters.items()}:
            raise InputError("the moving average is of another set of parameters", where=str(path))
        for name, shadow in zip(self._parameters, self._ema.shadow_params, strict=True):
            shadow.copy_(tensors[name])
