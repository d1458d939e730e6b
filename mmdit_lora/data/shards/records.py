"""Records that lie in shards, as a sequence that costs some dozen bytes a record: a layout is parsed when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, overload

import numpy as np
from PIL import Image

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.records import Record
from mmdit_lora.data.split import MOST_HELD_OUT, held_out
from mmdit_lora.errors import InputError

MOST_REQUESTS = 32  # for looks at a sample: some seconds


def _nothing() -> bytes:
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ShardRecord(Record):
    """A record in a shard. `image` is a name to show (`folder/shard.tar/key.jpg`), not a file; `where` is `shard.tar:key`.

    Args:
        read: the image's bytes. pixels: (width, height) of the upright image; None = its header is read.
    """

    read: Callable[[], bytes] = field(default=_nothing, repr=False, compare=False)
    pixels: tuple[int, int] | None = None

    def read_bytes(self) -> bytes:
        try:
            return self.read()
        except InputError as error:
            raise InputError(error.what, location=self.location, hint=error.hint) from None

    @property
    def file(self) -> None:
        return None

    def load(self) -> Image.Image:
        try:
            return load_image(self.read_bytes())
        except InputError as error:
            raise error if error.location else error.at(self.location) from None

    def size(self) -> tuple[int, int]:
        if self.pixels is not None:
            return self.pixels
        try:
            return image_size(self.read_bytes())
        except InputError as error:
            raise error if error.location else error.at(self.location) from None


class Part(Protocol):
    """One shard: its records, and what is known of all of them at once, each (records,)."""

    @property
    def name(self) -> str: ...
    @property
    def is_remote(self) -> bool: ...
    @property
    def content(self) -> np.ndarray:
        """uint64 hashes of the images' files."""

    @property
    def meta(self) -> np.ndarray:
        """uint64 hashes of what says the layouts."""

    @property
    def keys(self) -> np.ndarray:
        """uint64 keys by which images are held out: `name_key` of the file name where a record states one, else `content`."""

    @property
    def boxes(self) -> np.ndarray | None:
        """How many boxes; None where only reading the records would say it."""

    @property
    def pixels(self) -> np.ndarray | None:
        """(records, 2): width and height of the upright images; None likewise."""

    @property
    def blocks(self) -> Sequence[int]:
        """Records of each part of the shard that is cheap to read at once."""

    @property
    def run(self) -> int:
        """How many neighbouring records are read at once."""

    def __len__(self) -> int: ...
    def record(self, index: int) -> ShardRecord: ...


class _Places(Sequence[Record]):
    """A sequence of which a class says what lies at a place that is there."""

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


class ShardedRecords(_Places):
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
        counts = [part.boxes for part in self.parts]
        known = [int(of_part.sum(dtype=np.int64)) for of_part in counts if of_part is not None]
        return sum(known) if len(known) == len(counts) else None

    @cached_property
    def blocks(self) -> tuple[int, ...] | None:
        """For `epoch_order`: sizes of what should be read together; None where every record costs the same."""
        return tuple(size for part in self.parts for size in part.blocks) if _needs_blocks(self.parts) else None

    def pixels(self) -> np.ndarray:
        """(records, 2) uint32: width and height of every upright image, 0 where that is not known; nothing is read."""
        sides = [np.zeros((len(part), 2)) if part.pixels is None else part.pixels for part in self.parts]
        return np.concatenate([of_part.astype(np.uint32) for of_part in sides])

    def fingerprint(self) -> str:
        """sha256 over the hashes of all images and layouts, in order; the same wherever the shards lie and are cut."""
        digest = hashlib.sha256(b"shards")
        for part in self.parts:
            digest.update(np.stack([part.content, part.meta], axis=1).astype("<u8").tobytes())
        return digest.hexdigest()

    def split(self, share: float) -> tuple[Subset, Subset]:
        """(training, held out), by the rule of `mmdit_lora.data.split`; at most `MOST_HELD_OUT` images are held out.

        Raises:
            InputError: there are fewer than two images.
        """
        none = np.empty(0, dtype=np.int64)
        if share == 0:
            return Subset(self, none, without=True), Subset(self, none, without=False)
        keys = np.concatenate([part.keys for part in self.parts])
        held = np.flatnonzero(held_out(keys, share, most=MOST_HELD_OUT, location="data.validation_share"))
        return Subset(self, held, without=True), Subset(self, held, without=False)


class Subset(_Places):
    """Some records of a sharded set, or all but some.

    Args:
        chosen: (n,) rising indices. without: whether these are left out, rather than taken.
    """

    def __init__(self, whole: ShardedRecords, chosen: np.ndarray, *, without: bool) -> None:
        self.whole, self.chosen, self.without = whole, chosen, without
        # The i-th record that stays is behind as many left out ones as have at most i staying ones before them.
        self._before = chosen - np.arange(len(chosen))

    def __len__(self) -> int:
        return len(self.whole) - len(self.chosen) if self.without else len(self.chosen)

    def _at(self, place: int) -> Record:
        if self.without:
            return self.whole[place + int(np.searchsorted(self._before, place, side="right"))]
        return self.whole[int(self.chosen[place])]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @property
    def is_remote(self) -> bool:
        return self.whole.is_remote

    @property
    def run(self) -> int:
        return self.whole.run

    @cached_property
    def blocks(self) -> tuple[int, ...] | None:
        """As `ShardedRecords.blocks`, of the records that are in here."""
        whole = self.whole.blocks
        if whole is None:
            return None
        ends = np.searchsorted(self.chosen, np.cumsum([0, *whole]))
        inside = np.diff(ends)
        return tuple((np.asarray(whole) - inside if self.without else inside).tolist())

    def pixels(self) -> np.ndarray:
        """As `ShardedRecords.pixels`."""
        every = self.whole.pixels()
        return np.delete(every, self.chosen, axis=0) if self.without else every[self.chosen]

    def fingerprint(self) -> str:
        """Of the whole set's, and of which records these are."""
        digest = hashlib.sha256(self.whole.fingerprint().encode())
        digest.update(bytes([self.without]) + self.chosen.astype("<i8").tobytes())
        return digest.hexdigest()


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


def _needs_blocks(parts: Sequence[Part]) -> bool:
    return any(part.is_remote or len(part.blocks) > 1 for part in parts)
