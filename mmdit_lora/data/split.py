"""The one rule for which images are held out, and a data set's fingerprint.

An image's key is a hash of its file name without folders and extension. Images are ordered by their keys, and the first
`share` of them are held out. So the same images are held out of a folder, of what it was converted to, and of its shards;
on every machine, in any order of the lines; and a set that grows a little keeps nearly all of its split. All layouts of an
image, and all images of one name, are on the same side.

`data split`, `data convert --holdout`, training's `data.validation_share` and shards (which store the keys in their index)
use this module. A shard's record that states no file name is ordered by the hash of its image's bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np

from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError

RULE = "stem-1"  # stored with a run, so that a run of another rule is not resumed
BY = ("name", "image")
MOST_HELD_OUT = 10_000  # by a run: validating on more takes long and tells no more


@runtime_checkable
class Fingerprinted(Protocol):
    """Records whose content an index knows."""

    def fingerprint(self) -> str: ...


@runtime_checkable
class Indexed(Fingerprinted, Protocol):
    """Records that are split by an index: nothing is read."""

    def split(self, share: float) -> tuple[Sequence[Record], Sequence[Record]]: ...


def name_key(name: str) -> int:
    """The key of an image by its file name: the first 8 bytes of the sha256 of the stem."""
    stem = PurePosixPath(name).stem
    return int.from_bytes(hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def held_out(keys: np.ndarray, share: float, *, most: int | None = None, location: str | None = None) -> np.ndarray:
    """Which records are held out, (records,) bool: `share` of the distinct keys, at least one and never all.

    Args:
        keys: (records,) of any type that sorts. share: above 0, below 1; rounded to whole images.
        most: images that are held out at most. location: for the error.

    Raises:
        InputError: there are fewer than two images.
    """
    distinct = np.unique(keys)
    if len(distinct) < 2:
        what = f"holds a single image, or copies of one: too few to hold out a share of {share:g}"
        raise InputError(what, location=location, hint="give two images or more, or hold out none")
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1, most or len(distinct))
    mask: np.ndarray = keys <= distinct[count - 1]
    return mask


def split_records(
    records: Sequence[Record],
    share: float,
    *,
    by: str = "name",
    most: int | None = None,
    location: str | None = "data.validation_share",
) -> tuple[Sequence[Record], Sequence[Record]]:
    """(training, held out), each in its order; with a share of 0 nothing is held out.

    Args:
        by: "name", the rule above; or "image", the hash of the pixels, so that copies under other names and in other
            formats without loss stay together: every image is decoded.
        most, location: as of `held_out`.

    Raises:
        InputError: `share` or `by` is out of range, there are fewer than two images, or one cannot be decoded.
    """
    if not 0 <= share < 1:
        raise InputError(f"is {share}", location=location, hint="give a share between 0 and 1, e.g. 0.1")
    if by not in BY:
        raise InputError(f"is {by!r}", location="--by", hint=f"give one of {', '.join(BY)}")
    if isinstance(records, Indexed):
        return records.split(share)
    if share == 0:
        return list(records), []
    key_of = {record.image: _pixels(record) if by == "image" else name_key(record.name) for record in records}
    keys = np.array([key_of[record.image] for record in records], dtype=np.uint64)
    mask = held_out(keys, share, most=most, location=location)
    return (
        [record for record, held in zip(records, mask, strict=True) if not held],
        [record for record, held in zip(records, mask, strict=True) if held],
    )


def fingerprint_records(records: Sequence[Record]) -> str:
    """sha256 over names, sizes in bytes (of generated images: what they are made from) and layouts, in order.

    Pixels are not read: that takes minutes on large sets. Of shards: over their index, which holds hashes of the content.
    """
    if isinstance(records, Fingerprinted):
        return records.fingerprint()
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps((record.name, record.stamp, record.layout.to_dict()), sort_keys=True).encode())
    return digest.hexdigest()


def _pixels(record: Record) -> int:
    image = record.load()
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest()[:8], "big")
