"""Splitting a data set in two, the same on every machine and in any order of its lines; and a data set's fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mmdit_lora.data.records import Record
from mmdit_lora.data.shards import ShardedRecords, Subset
from mmdit_lora.errors import InputError

BY = ("name", "image")


def partition(records: Sequence[Record], share: float, *, by: str = "name") -> tuple[list[Record], list[Record]]:
    """(training, validation): `share` of the images, at least one and never all, is validation; each keeps its order.

    All layouts of one image are on one side. Images are ordered by the sha256 of their key, and the first ones taken,
    so that a set that grows a little keeps nearly all of its sides.

    Args:
        share: above 0, below 1; rounded to whole images.
        by: what an image's key is. "name": its file name, without folders, as a run's own `data.validation_share` has
            it. "image": its pixels, so that copies under other names, in other folders or formats without loss stay
            together; every image is decoded.

    Raises:
        InputError: `share` or `by` is out of range, there are fewer than two images, or one cannot be decoded.
    """
    if not 0 < share < 1:
        raise InputError(f"is {share}", location="--share", hint="give a share between 0 and 1, e.g. 0.1")
    if by not in BY:
        raise InputError(f"is {by!r}", location="--by", hint=f"give one of {', '.join(BY)}")
    key_of = {record.image: _pixels(record) if by == "image" else _name(record) for record in records}
    keys = sorted(set(key_of.values()))
    if len(keys) < 2:
        raise InputError(
            "holds a single image" if by == "name" else "holds a single image, or copies of one",
            location=records[0].location if records else None,
            hint="a split needs two images",
        )
    held = set(keys[: min(max(1, round(share * len(keys))), len(keys) - 1)])
    return (
        [record for record in records if key_of[record.image] not in held],
        [record for record in records if key_of[record.image] in held],
    )


def _name(record: Record) -> str:
    return hashlib.sha256(record.name.encode("utf-8", "surrogateescape")).hexdigest()


def _pixels(record: Record) -> str:
    image = record.load()
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def split_records(records: Sequence[Record], share: float) -> tuple[Sequence[Record], Sequence[Record]]:
    """(training, held out). A record's side depends on its file name alone, so that it stays where it is when others come;
    in shards, on the image's bytes.

    All layouts of one image are on one side.

    Raises:
        InputError: a side would be empty although `share` is above 0.
    """
    if isinstance(records, ShardedRecords):
        return records.split(share)
    if share == 0:
        return list(records), []
    names = sorted({record.name for record in records}, key=_digest)
    held_out = set(names[: max(1, round(share * len(names)))])
    sides = ([r for r in records if r.name not in held_out], [r for r in records if r.name in held_out])
    if not sides[0]:
        raise InputError(
            f"{len(names)} images are too few to hold out a share of {share}",
            location="data.validation_share",
            hint="set it to 0, or give more images",
        )
    return sides


def fingerprint_records(records: Sequence[Record]) -> str:
    """sha256 over names, sizes in bytes and layouts, in order. Pixels are not read: that takes minutes on large sets.

    Of shards: over their index, which knows the hashes of images and layouts.
    """
    if isinstance(records, ShardedRecords | Subset):
        return records.fingerprint()
    digest = hashlib.sha256()
    for record in records:
        entry = (record.name, record.image.stat().st_size, record.layout.to_dict())
        digest.update(json.dumps(entry, sort_keys=True).encode())
    return digest.hexdigest()


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
