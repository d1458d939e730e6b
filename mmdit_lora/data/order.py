"""In which order an epoch takes the records: a function of (seed, epoch) and of the set, and of nothing else.

Positions are global: processes and workers take disjoint positions of the one order, so that none meets another's record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 16  # blocks that are mixed with one another: what a reader of whole blocks must hold


def seeded(*key: int | str) -> torch.Generator:
    """A generator of its own for every key, e.g. ("train", seed, position)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode("utf-8", "surrogateescape")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=2)
def epoch_order(
    seed: int, epoch: int, count: int, blocks: tuple[int, ...] | None = None, window: int = WINDOW
) -> Tensor:
    """A permutation of `count` records, (count,) int32: 4 bytes a record. Not to be written to: it is kept.

    Args:
        blocks: numbers of records of consecutive parts of the set that are cheap to read together (shards of a remote
            store, row groups). Their order is drawn, and records are mixed within `window` consecutive blocks of that
            order, so that reading stays within so many blocks. None: every record may come anywhere.

    Raises:
        ValueError: `blocks` do not hold `count` records, or `count` is beyond int32.
    """
    if count >= 2**31:
        raise ValueError(f"{count} records are beyond int32")
    if blocks is None:
        return torch.randperm(count, generator=seeded("order", seed, epoch), dtype=torch.int32)
    if sum(blocks) != count or min(blocks, default=0) < 0 or window < 1:
        raise ValueError(f"blocks of {sum(blocks)} records in windows of {window}, for {count} records")
    starts = torch.tensor([0, *blocks], dtype=torch.int64).cumsum(0)
    shuffled = torch.randperm(len(blocks), generator=seeded("blocks", seed, epoch)).tolist()
    out, filled = torch.empty(count, dtype=torch.int32), 0
    for number, first in enumerate(range(0, len(blocks), window)):
        places = _records_of(shuffled[first : first + window], starts)
        drawn = torch.randperm(len(places), generator=seeded("window", seed, epoch, number))
        out[filled : filled + len(places)] = places[drawn]
        filled += len(places)
    return out


def _records_of(blocks: Sequence[int], starts: Tensor) -> Tensor:
    return torch.cat([torch.arange(starts[b].item(), starts[b + 1].item(), dtype=torch.int32) for b in blocks])
