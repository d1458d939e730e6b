"""Dropout whose mask belongs to a sample: drawn from its key, not from the state of a global generator.

PyTorch's dropout draws from one stream for the whole batch, so that what a sample sees depends on which process it is in and
on what else the batch holds. Here it depends on the sample's key and the layer alone: one process and eight drop the same,
a resumed run drops what an undisturbed one would, and so does a forward that checkpointing repeats.
"""

from __future__ import annotations

import zlib

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_BITS = 24


class SampleKeys:
    """The keys of the samples that are in the model now; (B,) int32, shared by all its `SampleDropout`."""

    value: Tensor | None = None


class SampleDropout(nn.Module):
    """Inverted dropout in training, the identity otherwise.

    Args:
        p: share of entries that become 0.
        name: of the layer, so that layers drop different entries.
        keys: shared; without a value, or where it is of another number of samples, PyTorch's dropout is used.
    """

    salt: Tensor

    def __init__(self, p: float, name: str, keys: SampleKeys) -> None:
        super().__init__()
        self.p, self.keys = p, keys
        # A tensor: as a number it would have `torch.compile` make every block anew.
        self.register_buffer("salt", torch.tensor(_signed(zlib.crc32(name.encode())), dtype=torch.int32), False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., D) to the same."""
        if not self.training:
            return x
        keys = self.keys.value
        if keys is None or keys.shape[0] != x.shape[0]:
            return nn.functional.dropout(x, self.p)
        drawn = sample_bits(keys, self.salt, x[0].numel()).view(x.shape)
        return x * (drawn >= round(self.p * 2**_BITS)) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def sample_bits(keys: Tensor, salt: Tensor, count: int) -> Tensor:
    """(B, count) int32, each uniform in [0, 2^24): a hash of key, salt and place; the same on every device.

    The mixing is MurmurHash3's 32-bit finaliser (Appleby, public domain), applied to the place and again with the key.

    Args:
        keys: (B,) int32. salt: () int32.
    """
    place = torch.arange(count, device=keys.device, dtype=torch.int32) * _signed(0x9E3779B1)
    return _shift(_mixed(_mixed(place + salt)[None] ^ keys[:, None]), 32 - _BITS)


def use_sample_dropout(model: nn.Module, adapter_name: str = "default") -> SampleKeys:
    """Replace the dropout of an adapter's LoRA layers; the keys are to be set before each forward."""
    keys = SampleKeys()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_dropout:
            dropout = module.lora_dropout[adapter_name]
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[adapter_name] = SampleDropout(dropout.p, name, keys)
    return keys


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left: PyTorch's own keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
