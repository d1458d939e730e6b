"""Records that lie in shards, as a sequence that costs some dozen bytes a record: a layout is parsed when it is asked for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, overload

import numpy as np
from PIL import Image

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.records import Record
from mmdit_lora.data.shards.store import Stored
from mmdit_lora.data.split import MOST_HELD_OUT, held_out
from mmdit_lora.errors import InputError

Result = TypeVar("Result")
MOST_REQUESTS = 32  # for looks at a sample: some seconds


@dataclass(frozen=True, slots=True)
class ShardRecord(Record):
    """A record in a shard. `image` is a name to show (`folder/shard.tar/key.jpg`), not a file; `location` is `shard.tar:key`.

    Args:
        read: the image's bytes. pixels: (width, height) of the upright image; None = its header is read.
    """

    read: Callable[[], bytes] = field(default=bytes, repr=False, compare=False)
    pixels: tuple[int, int] | None = None

    @property
    def file(self) -> None:
        return None

    def read_bytes(self) -> bytes:
        return self._located(self.read)

    def load(self) -> Image.Image:
        return self._located(lambda: load_image(self.read()))

    def size(self) -> tuple[int, int]:
        return self.pixels or self._located(lambda: image_size(self.read()))

    def _located(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except InputError as error:
            raise InputError(error.what, location=self.location, hint=error.hint) from None


class Part(ABC):
    """One shard.

    Attributes:
        blocks: records of each part of the shard that is cheap to read at once.
        run: how many neighbouring records are read at once.
    """

    stored: Stored
    blocks: Sequence[int]
    run: int = 1

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_remote(self) -> bool:
        return self.stored.is_remote

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def column(self, name: str) -> np.ndarray | None:
        """What is known of all records at once, (records,); None where only reading them would say it.

        Args:
            name: "content" and "meta", uint64 hashes of the image's file and of what says the layout; "key", by which images
                are held out: `name_key` of the file name where a record states one, else `content`; these are always known.
                "boxes", how many; "width" and "height" of the upright image.
        """

    @abstractmethod
    def record(self, index: int) -> ShardRecord:
        """Raises `InputError`: it cannot be read, or is not as it was when its shard was looked through."""


class _Lazy(Sequence[Record]):
    """A sequence by `_at`, which is given indices that are there."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Raises `InputError`: the record cannot be read, or is not as it was when its shard was looked through."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._at(place)

    def _at(self, place: int) -> Record:
        raise NotImplementedError


class ShardedRecords(_Lazy):
    """The records of shards in order, fetched one by one.

    Args:
        parts: the shards. remarks: lines for people, from opening them. edges: boxes that were clipped in what was read.
    """

    def __init__(self, parts: Sequence[Part], remarks: Sequence[str] = (), edges: EdgeCount | None = None) -> None:
        self.parts, self._remarks, self._edges = list(parts), list(remarks), edges or EdgeCount()
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, place: int) -> Record:
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.parts[shard].record(place - int(self._starts[shard]))

    @property
    def remarks(self) -> list[str]:
        """Lines for people: from opening the shards, and on the boxes that were clipped so far."""
        return [*self._remarks, *([self._edges.message] if self._edges.message else [])]

    @property
    def is_remote(self) -> bool:
        """Whether reading a record may be a request to a store."""
        return any(part.is_remote for part in self.parts)

    @property
    def run(self) -> int:
        """How many neighbouring records may be read at once."""
        return max(part.run for part in self.parts)

    @property
    def boxes(self) -> int | None:
        """Of all records together; None where only reading them would say it."""
        known = all(part.column("boxes") is not None for part in self.parts)
        return int(self._column("boxes").sum(dtype=np.int64)) if known else None

    @cached_property
    def blocks(self) -> tuple[int, ...] | None:
        """For `epoch_order`: sizes of what should be read together; None where every record costs the same."""
        if not any(part.is_remote or len(part.blocks) > 1 for part in self.parts):
            return None
        return tuple(size for part in self.parts for size in part.blocks)

    def pixels(self) -> np.ndarray:
        """(records, 2) uint32: width and height of every upright image, 0 where that is not known; nothing is read."""
        return np.stack([self._column(name) for name in ("width", "height")], axis=1)

    def fingerprint(self) -> str:
        """sha256 over the hashes of all images and layouts, in order; the same wherever the shards lie and are cut."""
        rows = np.stack([self._column(name) for name in ("content", "meta")], axis=1)
        return hashlib.sha256(b"shards" + rows.astype("<u8").tobytes()).hexdigest()

    def split(self, share: float) -> tuple[Subset, Subset]:
        """(training, held out), by the rule of `mmdit_lora.data.split`; at most `MOST_HELD_OUT` images are held out.

        Raises:
            InputError: there are fewer than two images.
        """
        mask = np.zeros(len(self), dtype=bool)
        if share:
            mask = held_out(self._column("key"), share, most=MOST_HELD_OUT, location="data.validation_share")
        return Subset(self, np.flatnonzero(~mask)), Subset(self, np.flatnonzero(mask))

    def _column(self, name: str) -> np.ndarray:
        """Of all records; 0 where that is not known."""
        columns = [(part.column(name), len(part)) for part in self.parts]
        return np.concatenate([np.zeros(count, np.uint32) if c is None else c for c, count in columns])


class Subset(_Lazy):
    """Some records of a sharded set.

    Args:
        chosen: (n,) rising indices.
    """

    def __init__(self, whole: ShardedRecords, chosen: np.ndarray) -> None:
        self.whole, self.chosen = whole, chosen.astype(np.uint32)
        self.is_remote, self.run = whole.is_remote, whole.run

    def __len__(self) -> int:
        return len(self.chosen)

    def _at(self, place: int) -> Record:
        return self.whole[int(self.chosen[place])]

    @cached_property
    def blocks(self) -> tuple[int, ...] | None:
        """As `ShardedRecords.blocks`, of the records that are in here."""
        whole = self.whole.blocks
        if whole is None:
            return None
        return tuple(np.diff(np.searchsorted(self.chosen, np.cumsum([0, *whole]))).tolist())

    def pixels(self) -> np.ndarray:
        """As `ShardedRecords.pixels`."""
        return self.whole.pixels()[self.chosen]

    def fingerprint(self) -> str:
        """Of the whole set's, and of which records these are."""
        return hashlib.sha256(self.whole.fingerprint().encode() + self.chosen.astype("<u4").tobytes()).hexdigest()


def spread(records: ShardedRecords | Subset, most: int) -> list[Record]:
    """At most `most` records, evenly spread over all, in runs where several are read at once; few of a remote store."""
    total, run = len(records), min(records.run, most)
    if records.is_remote:
        most = min(most, max(MOST_REQUESTS, 2 * run))
    if most >= total:
        return list(records)
    runs = most // run
    starts = [number * total // runs for number in range(runs)]
    return [record for start in starts for record in records[start : start + run]]
