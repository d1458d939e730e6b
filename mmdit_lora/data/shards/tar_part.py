"""A tar shard that is open: its index, and its records by ranged reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.shards.index import fetch_index, load_index, save_index
from mmdit_lora.data.shards.records import ShardRecord
from mmdit_lora.data.shards.store import Stored
from mmdit_lora.data.shards.tar import digest, read_layout, scan
from mmdit_lora.errors import InputError
from mmdit_lora.files import inside

_BLOCK, _NEAR = 512, 64 * 1024  # bytes; members of a remote record that lie so near are read at once


class TarPart:
    """Raises `InputError` where the shard, or a record of it, is wrong and no index says that it was right.

    Args:
        edges: counts the boxes that were clipped when the shard was looked through. tell: called with a line for people.
    """

    def __init__(
        self, stored: Stored, *, bbox_format: str, bbox_units: str, edges: EdgeCount, tell: Callable[[str], None]
    ) -> None:
        self.stored, self._bbox_format, self._bbox_units = stored, bbox_format, bbox_units
        conventions = f"{bbox_format} {bbox_units}"
        rows, counted = (fetch_index if stored.is_remote else load_index)(stored, conventions)
        if rows is None:
            if stored.is_remote:
                tell(
                    f"{stored.name}: has no index beside it, so all of it is read at every start; `data shard` writes them"
                )
            rows = scan(stored, bbox_format=bbox_format, bbox_units=bbox_units, edges=counted)
            if not stored.is_remote:
                try:
                    save_index(stored, rows, conventions, counted)
                    mapped, _ = load_index(stored, conventions)
                    rows = rows if mapped is None else mapped
                except OSError as error:
                    tell(
                        f"{stored.name}: its index cannot be kept beside it ({error.strerror}) and is made at every start"
                    )
        self.rows = rows
        edges.merge(counted)

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def is_remote(self) -> bool:
        return self.stored.is_remote

    @property
    def content(self) -> np.ndarray:
        return self.rows["content"]

    @property
    def meta(self) -> np.ndarray:
        return self.rows["meta"]

    @property
    def keys(self) -> np.ndarray:
        return self.rows["key"]

    @property
    def boxes(self) -> np.ndarray:
        return self.rows["boxes"]

    @property
    def pixels(self) -> np.ndarray:
        return np.stack([self.rows["width"], self.rows["height"]], axis=1)

    @property
    def blocks(self) -> Sequence[int]:
        return (len(self.rows),)

    @property
    def run(self) -> int:
        return 1

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> ShardRecord:
        row = self.rows[index]
        member = bytes(row["name"]).decode()
        inside(".", member, location=self.name, what="member")  # an index may have been written by anyone
        folder, slash, base = member.rpartition("/")
        location = f"{self.name}:{folder}{slash}{base.partition('.')[0]}"
        places = {
            kind: (int(row[kind]) * _BLOCK, int(row[f"{kind}_bytes"]))
            for kind in ("json", "text", "image")
            if row[f"{kind}_bytes"]
        }
        wanted, pixels = int(row["content"]), (int(row["width"]), int(row["height"]))
        try:
            held = self._read_together(places)
            data, text = held["json"], held.get("text", b"")
            self._verify(int(row["meta"]), data, text)
            layout, extra = read_layout(
                data, text or None, lambda: pixels, bbox_format=self._bbox_format, bbox_units=self._bbox_units
            )
        except InputError as error:
            raise InputError(error.what, location=location, hint=error.hint) from None
        kept = held.get("image")
        start, length = places["image"]

        def read() -> bytes:
            image = kept if kept is not None else self.stored.read(start, length)
            self._verify(wanted, image)
            return image

        return ShardRecord(
            image=Path(self.name) / member,
            layout=layout,
            location=location,
            extra=extra,
            read=read,
            pixels=pixels,
        )

    def _read_together(self, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        """The texts of a record; of a remote one its image too where that costs no second request."""
        wanted = places if self.is_remote else {kind: place for kind, place in places.items() if kind != "image"}
        first = min(start for start, _ in wanted.values())
        last = max(start + length for start, length in wanted.values())
        if last - first > sum(length for _, length in wanted.values()) + _NEAR:
            wanted = {kind: place for kind, place in wanted.items() if kind != "image"}
            return {kind: self.stored.read(*place) for kind, place in wanted.items()}
        together = self.stored.read(first, last - first)
        return {kind: together[start - first : start - first + length] for kind, (start, length) in wanted.items()}

    def _verify(self, wanted: int, *parts: bytes) -> None:
        if digest(*parts) != wanted:
            hint = "start again, and the index is made anew; do not change shards during a run"
            if self.is_remote:
                hint = "store the shard together with the index that `data shard` wrote beside it, or without any"
            raise InputError("is not what it was when the shard's index was made", hint=hint)
