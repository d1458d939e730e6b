"""Switches that save memory or time and change no result: checkpointing, attention backend, compilation."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

from mmdit_lora.config.loading import TrainSection
from mmdit_lora.errors import InputError


def apply_performance(model: Any, settings: TrainSection, *, device: torch.device, dtype: torch.dtype) -> None:
    """Set what `settings` asks for on a transformer that has its adapter already.

    Args:
        dtype: that the attention computes in.

    Raises:
        InputError: there is no such attention backend, or it cannot train this model here.
    """
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing(every=int(settings.gradient_checkpointing))
    if settings.attention_backend is not None:
        _set_attention_backend(model, settings.attention_backend, device, dtype)
    if settings.compile:
        model.compile_repeated_blocks()


def _set_attention_backend(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
    location = "train.attention_backend"
    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"is {name!r}, which diffusers does not know", location=location, hint=hint)
    if name.startswith("sage"):
        raise InputError(
            f"is {name!r}, which has no backward pass: it samples, it cannot train",
            location=location,
            hint="set it to null",
        )
    try:
        with attention_backend(name):  # puts the process's default back, which `set_attention_backend` changes too
            model.set_attention_backend(name)
            _try_out(model, name, device, dtype)
    except (RuntimeError, ImportError, ValueError, NotImplementedError, AssertionError, TypeError) as error:
        model.reset_attention_backend()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"is {name!r}, which cannot train this base here: {first}",
            location=location,
            hint="set it to null, or to one that takes a mask and has a backward pass, such as _native_math",
        ) from error


def _try_out(model: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """One small attention, forward and backward, as this model calls it: backends differ in masks, dtypes and devices."""
    config = model.config
    shape = (1, 8, config.num_attention_heads, config.attention_head_dim)
    query = torch.zeros(shape, device=device, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool, device=device) if config.mask_padding else None
    out = dispatch_attention_fn(query, query, query, attn_mask=mask, backend=AttentionBackendName(name))
    out.sum().backward()
