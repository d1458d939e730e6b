"""The order of a run's records and their batches: functions of (seed, position) and of the data set alone.

Positions count samples through the whole run, over all processes and accumulated batches. Processes and workers take
disjoint positions of one order, so no two of them read the same record; and a run resumes at a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
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
        places = torch.cat(
            [torch.arange(*starts[b : b + 2].tolist(), dtype=torch.int32) for b in shuffled[first : first + window]]
        )
        drawn = torch.randperm(len(places), generator=seeded("window", seed, epoch, number))
        out[filled : filled + len(places)] = places[drawn]
        filled += len(places)
    return out


class BatchPlan:
    """Batches of one group each, in an order of their own for every epoch.

    A group's records come in the order that `order` has them in, epoch after epoch, and are cut into batches across the
    ends of epochs: what is left of a group opens its first batch of the next epoch. So no batch is short, no record is
    left out, and none comes again before all others of its group have come. With one group this is `order` itself, read
    on and on.

    Args:
        count: records.
        batch: records of a batch; of an optimizer step over all processes, so that the plan does not depend on their
            number.
        order: epoch -> permutation of the records, (count,) int64.
        shuffle: (epoch, n) -> permutation of n batches, (n,) int64; not asked for with one group.
        groups: of each record, what is equal within a batch; None = one group.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        *,
        order: Callable[[int], Tensor],
        shuffle: Callable[[int, int], Tensor],
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        self.count, self.batch, self._order, self._shuffle = count, batch, order, shuffle
        self._group: Tensor | None = None
        self.sizes = [count]
        if groups is not None:
            number = {name: index for index, name in enumerate(dict.fromkeys(groups))}
            self._group = torch.tensor([number[name] for name in groups], dtype=torch.int32)
            self.sizes = torch.bincount(self._group).tolist()
        self._members = lru_cache(maxsize=2)(self._members_of)
        self._batches = lru_cache(maxsize=2)(self._batches_of)

    def record(self, position: int) -> int:
        """The record at `position` of the run."""
        number, place = divmod(position, self.batch)
        group, row = self._batch(number)
        epoch, index = divmod(row * self.batch + place, self.sizes[group])
        return int(self._members(epoch)[group][index])

    def _batch(self, number: int) -> tuple[int, int]:
        """(group, which batch of it) of batch `number` of the run."""
        if len(self.sizes) == 1:
            return 0, number
        epoch = number * self.batch // self.count  # or a little later: of each group less than a batch is still to come
        while self._complete(epoch) <= number:
            epoch += 1
        return self._batches(epoch)[number - self._complete(epoch - 1)]

    def _complete(self, epoch: int) -> int:
        """Batches that are complete when `epoch` ends."""
        return sum((epoch + 1) * size // self.batch for size in self.sizes)

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        own = [
            (group, row)
            for group, size in enumerate(self.sizes)
            for row in range(epoch * size // self.batch, (epoch + 1) * size // self.batch)
        ]
        return [own[index] for index in self._shuffle(epoch, len(own)).tolist()]

    def _members_of(self, epoch: int) -> Sequence[Tensor]:
        order = self._order(epoch)
        if self._group is None:
            return (order,)
        # A stable sort: within a group the epoch's order stays.
        return order[torch.sort(self._group[order], stable=True).indices].split(self.sizes)


def box_count_group(boxes: int) -> int:
    """0, 1, 2, 4, 8, 16, ...: the smallest of them that is at least `boxes`, so that padding at most doubles a layout."""
    return boxes if boxes < 3 else 1 << (boxes - 1).bit_length()


def micro_batches(size: int, numbers: range, *, world: int = 1, process: int = 0) -> Iterator[range]:
    """The positions of one process's micro-batches, from any number of the run on.

    Args:
        size: samples of a micro-batch in one process. numbers: of the micro-batches, counted through the run.
        world, process: how many processes there are, and which one this is: their positions are disjoint.
    """
    for number in numbers:
        first = (number * world + process) * size
        yield range(first, first + size)
