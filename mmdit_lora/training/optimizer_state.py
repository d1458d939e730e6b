"""Optimizer state in safetensors: no pickle is ever read from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mmdit_lora.errors import InputError


def save_optimizer(optimizer: Optimizer, path: str | Path) -> None:
    """Write every state tensor of `optimizer` as `<parameter index>.<name>`. Hyperparameters come from the config."""
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(tensors, path)


def load_optimizer(optimizer: Optimizer, path: str | Path) -> None:
    """The inverse of `save_optimizer`, for an optimizer over the same parameters in the same order.

    Raises:
        InputError: the state belongs to other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if state and (
        set(state) != set(range(len(parameters)))
        or any(t.ndim and t.shape != parameters[i].shape for i, entry in state.items() for t in entry.values())
    ):
        raise InputError("the optimizer state is of another set of parameters", where=str(path))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
