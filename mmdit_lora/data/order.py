"""In which order records come: a function of (seed, epoch), so that any position is reached without those before it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seeded(*key: int | str) -> torch.Generator:
    """A generator of its own for every key, e.g. ("train", seed, position)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """A permutation of `count` records, (count,) int64, one for every (seed, epoch)."""
    return torch.randperm(count, generator=seeded("order", seed, epoch))
