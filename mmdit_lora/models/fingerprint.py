"""Which base a model is: a hash over its weights, the same however it is stored and opened."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

FINGERPRINT = "_mmdit_lora_fingerprint"  # the attribute that keeps it on a model


def base_fingerprint(model: nn.Module, *, with_stream: bool = True) -> str:
    """SHA-256 over names, shapes and values of all parameters but LoRA.

    Values are rounded to bf16 first, so that a base gives one fingerprint as stored (fp16, bf16 or fp32), opened as fp32
    and opened as bf16, with or without adapters. A quantised base has a fingerprint of its own.

    Hashing several GB takes a while: the answer is kept on the model, for as long as no bit of its parameters changes.

    Args:
        with_stream: with the parameters of its layout stream; without, it is that of the stock model.

    Raises:
        ValueError: the model is on the meta device.
    """
    digest = hashlib.sha256()
    named: dict[str, Tensor] = {
        name.replace(".base_layer.", "."): p
        for name, p in model.named_parameters()
        if "lora_" not in name and (with_stream or "layout" not in name)
    }
    for name, value in named.items():
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: a fingerprint needs values")
    state = {name: _state_of(value) for name, value in named.items()}
    kept: dict[bool, tuple[Any, str]] = getattr(model, FINGERPRINT, {})
    if with_stream in kept and kept[with_stream][0] == state and None not in state.values():
        return kept[with_stream][1]
    for name in sorted(named):
        value = named[name].detach()
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    setattr(model, FINGERPRINT, kept | {with_stream: (state, digest.hexdigest())})
    return digest.hexdigest()


def _state_of(value: Tensor) -> tuple[Any, ...] | None:
    """What changes with any change of a parameter: its place and version, and the sum of its bits, since `.data` may be
    written without either. None where that cannot be told (a tensor of another kind, as quantised ones are)."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.element_size())
    if type(value) not in (Tensor, nn.Parameter) or words is None or value.is_inference() or value.is_complex():
        return None
    bits = value.detach().contiguous().view(words).sum(dtype=torch.int64).item()
    return (value.shape, value.dtype, value.device, value.data_ptr(), value._version, bits)
