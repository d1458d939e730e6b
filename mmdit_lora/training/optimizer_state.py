"""Optimizer state in safetensors: no pickle is ever read from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from mmdit_lora.errors import InputError
from mmdit_lora.training.sharding import like, whole
from mmdit_lora.training.zero import is_zero_optimizer, optimizer_tensors, put_optimizer, zero_parameters

_GROUPS = "groups"


@dataclass(frozen=True)
class OptimizerState:
    """Everything that an optimizer knows, whole and on the CPU.

    Args:
        tensors: `<parameter index>.<name>` -> state. groups: the numbers of its groups. Most hyperparameters come from the
            config; but Prodigy keeps what it has found out among them.
    """

    tensors: dict[str, Tensor]
    groups: list[dict[str, int | float]]

    @classmethod
    def of(cls, optimizer: Optimizer) -> OptimizerState:
        """Collective where parameters are spread over processes."""
        groups = optimizer.param_groups
        numbers = [{name: _number(v) for name, v in group.items() if _is_number(v)} for group in groups]
        if is_zero_optimizer(optimizer):
            return cls(optimizer_tensors(optimizer), numbers)
        tensors = {
            f"{index}.{name}": whole(torch.as_tensor(value))
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
            if value is not None
        }
        return cls(tensors, numbers)

    def save(self, path: Path) -> None:
        """As safetensors, the groups in the header."""
        save_file(self.tensors, path, metadata={_GROUPS: json.dumps(self.groups)})


def load_optimizer(optimizer: Optimizer, path: str | Path) -> None:
    """Take back what `OptimizerState.save` wrote, for an optimizer over the same parameters in the same order.

    Raises:
        InputError: the state belongs to other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        groups = json.loads((file.metadata() or {}).get(_GROUPS, "[]"))
        for key in file.keys():  # noqa: SIM118 - no mapping
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
    zero = is_zero_optimizer(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if zero:
        parameters = zero_parameters(optimizer)
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]  # ZeRO-3 empties what it has spread
    if state and (
        set(state) != set(range(len(parameters)))
        or any(
            t.ndim and t.shape not in (shapes[i], torch.Size([shapes[i].numel()]))
            for i, entry in state.items()
            for t in entry.values()
        )
        or (groups and len(groups) != len(optimizer.param_groups))
    ):
        raise InputError("the optimizer state is of another set of parameters", where=str(path))
    now = optimizer.param_groups if zero else optimizer.state_dict()["param_groups"]
    for group, saved in zip(now, groups or [{}] * len(now), strict=True):
        # A schedule sets the rate; what a group has beyond the constructor's arguments is the optimizer's own finding.
        group |= {name: value for name, value in saved.items() if name in group}
    if zero:
        if state:
            put_optimizer(optimizer, state)
        return
    spread = {
        index: {name: like(tensor, parameters[index]) for name, tensor in entry.items()}
        for index, entry in state.items()
    }
    optimizer.load_state_dict({"state": spread, "param_groups": now})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _number(value: object) -> int | float:
    return value.item() if isinstance(value, Tensor) else value  # type: ignore[return-value]
