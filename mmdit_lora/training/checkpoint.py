"""Checkpoints: what trains and its optimizer state, never the base; safetensors and JSON, no pickle.

A checkpoint is written beside its place, fsynced and renamed: it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mmdit_lora.errors import InputError
from mmdit_lora.files import atomic_folder, remove_folder, write_json
from mmdit_lora.json_files import read_object
from mmdit_lora.training.deepspeed import is_zero_optimizer, optimizer_tensors, put_optimizer, zero_parameters
from mmdit_lora.training.sharding import copy_full, full_tensor, shard_like

_GROUPS = "groups"


def optimizer_writer(optimizer: Optimizer) -> Callable[[Path], None]:
    """What writes all that an optimizer knows, whole: `<parameter index>.<name>` -> state, the numbers of its groups in the
    header. (Most of these come from the config; but Prodigy keeps what it has found out among them.)

    It is gathered now: collective where parameters are spread over processes.
    """
    groups = [
        {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if _is_number(value)
        }
        for group in optimizer.param_groups
    ]
    if is_zero_optimizer(optimizer):
        tensors = optimizer_tensors(optimizer)
    else:
        states = optimizer.state_dict()["state"].items()
        known = ((f"{n}.{name}", value) for n, state in states for name, value in state.items() if value is not None)
        tensors = {key: full_tensor(torch.as_tensor(value)) for key, value in known}
    return lambda path: save_file(tensors, path, metadata={_GROUPS: json.dumps(groups)})


def load_optimizer(optimizer: Optimizer, path: str | Path) -> None:
    """Take back what `optimizer_writer` wrote, for an optimizer over the same parameters in the same order.

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
    parameters = zero_parameters(optimizer) if zero else [p for g in optimizer.param_groups for p in g["params"]]
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]  # ZeRO-3 empties what it has spread
    if (
        (state and state.keys() != set(range(len(parameters))))
        or len(groups or optimizer.param_groups) != len(optimizer.param_groups)
        or any(
            tensor.ndim and tensor.shape not in (shapes[n], (shapes[n].numel(),))
            for n, entry in state.items()
            for tensor in entry.values()
        )
    ):
        raise InputError("the optimizer state is of another set of parameters", location=str(path))
    now = optimizer.param_groups if zero else optimizer.state_dict()["param_groups"]
    for group, saved in zip(now, groups or [{}] * len(now), strict=True):
        # A schedule sets the rate; what a group has beyond the constructor's arguments is the optimizer's own finding.
        group |= {name: value for name, value in saved.items() if name in group}
    if zero and state:
        put_optimizer(optimizer, state)
    elif not zero:
        spread = {n: {name: shard_like(t, parameters[n]) for name, t in entry.items()} for n, entry in state.items()}
        optimizer.load_state_dict({"state": spread, "param_groups": now})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


WEIGHTS, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step_(\d{7})")


@dataclass
class State:
    """What changes as a run goes on, beside weights and optimizer; all of it is in every checkpoint.

    Args:
        step: optimizer steps done.
        best_step, best: of the best validation so far, and its value (higher is better); None before the first.
        stale: validations since.
        tracker_run_id: what the tracker goes on with.
        seconds: spent on it, over all starts.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    step: int = 0
    best_step: int | None = None
    best: float | None = None
    stale: int = 0
    tracker_run_id: str | None = None
    seconds: float = 0.0


class _Saved(BaseModel):
    """What every version writes into `state.json`; what is read of it elsewhere has these types."""

    model_config = ConfigDict(strict=True)
    step: int
    config: dict[str, Any]
    fingerprints: dict[str, str]
    batches: dict[str, int]
    schedule_step: int
    start: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    run: State
    sha256: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk, `<output_dir>/checkpoints/step_NNNNNNN`."""

    folder: Path

    @property
    def step(self) -> int:
        match = _NAME.fullmatch(self.folder.name)
        assert match
        return int(match[1])

    def state(self) -> dict[str, Any]:
        """What `save` was given, after a check that the files are the ones that were written.

        Raises:
            InputError: a file is missing or changed; the newest older checkpoint that is whole is named.
        """
        try:
            state = self._read()
            for name, digest in state["sha256"].items():
                if not (self.folder / name).is_file() or _sha256(self.folder / name) != digest:
                    raise InputError(f"{name} is missing or not what was saved", location=str(self.folder))
        except InputError as error:
            raise InputError(error.what, location=error.location, hint=self._hint()) from None
        return state

    def others(self) -> set[str]:
        """Names of files in it that no checkpoint has: the user's; where its state cannot be read, all of them."""
        try:
            written = {STATE, *self._read()["sha256"]}
        except InputError:
            written = set()
        return {path.name for path in self.folder.iterdir()} - written

    def _read(self) -> dict[str, Any]:
        file = self.folder / STATE
        state = read_object(file, what="state of a checkpoint")
        try:
            _Saved.model_validate_json(json.dumps(state))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"is not what was saved: {key}: {first['msg']}", location=str(file)) from None
        return state

    def _hint(self) -> str:
        older = [other for other in checkpoints(self.folder.parent) if other.step < self.step]
        if not older:
            return "it is the oldest one: start the run anew in another output_dir"
        try:
            older[-1].state()
        except InputError as error:  # its hint names those before it
            return f"remove this checkpoint and {older[-1].folder.name}, which is damaged too; {error.hint}"
        return f"remove this checkpoint; `--resume latest` then takes the one before, {older[-1].folder.name}"

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights that train, and the optimizer's state, back.

        Raises:
            InputError: the checkpoint is of another set of trainable parameters.
        """
        self.load_weights(model)
        load_optimizer(optimizer, self.folder / OPTIMIZER)

    def load_weights(self, model: nn.Module) -> None:
        """Put the weights that train back, nothing else. Raises `InputError` as `load` does."""
        tensors = load_file(self.folder / WEIGHTS)
        trainable = trainable_parameters(model)
        if {n: p.shape for n, p in trainable.items()} != {n: t.shape for n, t in tensors.items()}:
            raise InputError(
                "holds other parameters than those that train now",
                location=str(self.folder),
                hint="resume with the config that the run was started with",
            )
        with torch.no_grad():
            for name, parameter in trainable.items():
                copy_full(parameter, tensors[name])


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that requires grad, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    extra: Mapping[str, Callable[[Path], None]],
    keep: int,
    best: int | None = None,
    write: bool = True,
) -> Checkpoint:
    """Write `folder/step_NNNNNNN`, then remove all but the newest `keep` and the one of step `best`.

    Args:
        extra: file name -> what writes it.
        write: false = only take part: where parameters are spread over processes, all are needed to gather them.
    """
    target = folder / f"step_{step:07d}"
    tensors = {name: full_tensor(p) for name, p in trainable_parameters(model).items()}
    files: dict[str, Callable[[Path], Any]] = {
        WEIGHTS: partial(save_file, tensors),
        OPTIMIZER: optimizer_writer(optimizer),
        **extra,
    }
    if not write:
        return Checkpoint(target)
    with atomic_folder(target) as temporary:
        for name, write_file in files.items():
            write_file(temporary / name)
        digests = {name: _sha256(temporary / name) for name in files}
        write_json(temporary / STATE, {**state, "step": step, "sha256": digests})
    prune_checkpoints(folder, keep, best)
    return Checkpoint(target)


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` and the one of step `best`.

    At the start of a resumed run too: a kill between writing and pruning leaves one too many, and many such kills would
    leave many. So at any moment a run has at most `keep` + 1 (the best) + 1 (just written, or half) on the disk.
    """
    for old in checkpoints(folder)[:-keep]:
        if old.step != best and not old.others():
            remove_folder(old.folder)


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All whole checkpoints, oldest first. What a kill left half-written has another name and is never listed."""
    if not folder.is_dir():
        return []
    found = [Checkpoint(p) for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
