"""Reading ahead on threads: while a step computes, the images of the next ones come from their store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from mmdit_lora.data.records import Record
from mmdit_lora.data.shards.records import ShardRecord


def held(record: Record) -> Record:
    """The record with its image's bytes in memory, where they lie in a shard: read once, however often it is asked."""
    if not isinstance(record, ShardRecord):
        return record
    data = record.read_bytes()
    return replace(record, read=lambda: data)


class Prefetcher:
    """Records of a set by index, those that were announced already on their way.

    What a record raises is raised where it is taken, and nowhere else.

    Args:
        threads: reads at a time; 0 = nothing is read ahead.
        most: records on their way or waiting; those announced first go first.
    """

    def __init__(self, records: Sequence[Record], *, threads: int, most: int = 256) -> None:
        self._records, self._most = records, most
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") if threads else None
        self._coming: OrderedDict[int, Future[Record]] = OrderedDict()

    def announce(self, indices: Iterable[int]) -> None:
        """Begin to read these, if they are not being read yet."""
        if self._pool is None:
            return
        for index in indices:
            if index not in self._coming:
                self._coming[index] = self._pool.submit(self._read, index)
        while len(self._coming) > self._most:
            self._coming.popitem(last=False)[1].cancel()

    def take(self, index: int) -> Record:
        """The record, read ahead or now."""
        coming = self._coming.pop(index, None)
        return self._read(index) if coming is None else coming.result()

    def _read(self, index: int) -> Record:
        return held(self._records[index])
