"""Training and held-out records, and a fingerprint of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mmdit_lora.data.records import Record
from mmdit_lora.data.shards import ShardedRecords, Subset
from mmdit_lora.errors import InputError


def split_records(records: Sequence[Record], share: float) -> tuple[Sequence[Record], Sequence[Record]]:
    """(training, held out). A record's side depends on its file name alone, so that it stays where it is when others come;
    in shards, on the picture's bytes.

    All layouts of one picture are on one side.

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
            f"{len(names)} pictures are too few to hold out a share of {share}",
            where="data.validation_share",
            cure="set it to 0, or give more pictures",
        )
    return sides


def fingerprint_records(records: Sequence[Record]) -> str:
    """sha256 over names, sizes in bytes and layouts, in order. Pixels are not read: that takes minutes on large sets.

    Of shards: over their index, which knows the hashes of pictures and layouts.
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
