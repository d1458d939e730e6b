"""Training from an adapter in place of a new one: `lora.start`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora import load_adapter, lora_state_dict, remove_adapter
from mmdit_lora.lora.adapt import with_adapter

_OWN, _START = "default", "start"


@dataclass(frozen=True)
class Start:
    """What a run began from, as its adapter tells others: no path of this machine.

    Args:
        name: of the adapter's folder; of the run's where that is called "adapter".
        fingerprint: SHA-256 over the names, shapes and values of its tensors.
    """

    name: str
    fingerprint: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def begin_from(model: nn.Module, adapter: str, *, base_fingerprint: str | None = None) -> Start:
    """Give the new adapter of `model` the weights of another one. Optimizer and schedule know nothing of that.

    Args:
        model: with the adapter "default"; changed in place.
        base_fingerprint: of `model`; compared with the one that the other adapter was trained on.

    Raises:
        InputError: it is no adapter, is of another base, or its targets, ranks or strengths are not those of the config:
            both are named.
    """
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        load_adapter(model, adapter, adapter_name=_START, expect_fingerprint=base_fingerprint)
    except InputError as error:
        raise error.at("lora.start") from None
    wanted, found = _shape(model, _OWN), _shape(model, _START)
    if wanted != found:
        raise _misfit(adapter, wanted, found)
    tensors = lora_state_dict(model, _START)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            own[with_adapter(name, _OWN)].copy_(value)
    fingerprint = _digest(tensors)
    remove_adapter(model, _START)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    return Start(_name(adapter), fingerprint)


def _shape(model: nn.Module, adapter: str) -> dict[str, tuple[int, float, bool]]:
    """Name of each linear -> (rank, factor of its update, whether DoRA), as PEFT applies them."""
    return {
        name: (int(layer.r[adapter]), round(float(layer.scaling[adapter]), 6), adapter in layer.lora_magnitude_vector)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }


def _misfit(
    adapter: str, wanted: Mapping[str, tuple[int, float, bool]], found: Mapping[str, tuple[int, float, bool]]
) -> InputError:
    parts = []
    if missing := [name for name in wanted if name not in found]:
        parts.append(f"{len(missing)} targets of the config are not in it ({listed(missing[:2])})")
    if more := [name for name in found if name not in wanted]:
        parts.append(f"{len(more)} of its targets are not in the config ({listed(more[:2])})")
    odd = [name for name in wanted if name in found and wanted[name] != found[name]]
    if odd:
        parts.append(f"{len(odd)} targets differ, {odd[0]} for one")
    return InputError(
        f"{adapter} does not fit this config: it has {_told(found)}; the config asks for {_told(wanted)}; {'; '.join(parts)}",
        where="lora.start",
        cure="give lora.r, lora.alpha, lora.targets, patterns, rslora and dora as the adapter was trained with (its "
        "adapter_config.json states them), or leave lora.start out",
    )


def _told(shape: Mapping[str, tuple[int, float, bool]]) -> str:
    ranks = sorted({rank for rank, _, _ in shape.values()})
    factors = sorted({factor for _, factor, _ in shape.values()})
    endings = sorted({".".join(name.split(".")[-2:]) for name in shape})
    dora = ", DoRA" if any(dora for _, _, dora in shape.values()) else ""
    return (
        f"{len(shape)} targets ({listed(endings)}) of rank {listed(ranks)}, "
        f"scaled by {listed(f'{factor:g}' for factor in factors)}{dora}"
    )


def _digest(tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(adapter: str) -> str:
    path = Path(adapter).resolve()
    return path.parent.name if path.name == "adapter" else path.name
