"""The part of a check that costs next to nothing, before the first step of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from mmdit_lora.data.check.images import look_at
from mmdit_lora.data.images import opened
from mmdit_lora.data.records import Record
from mmdit_lora.files import require_file

HEADERS = 1000  # read before a run: some tenths of a second


def quick_check(records: Sequence[Record]) -> None:
    """Look at every file's size and at `HEADERS` images' headers, evenly spread over the set. Nothing is decoded.

    Raises:
        InputError: the first file that is empty, declares more pixels than is safe, or is no image; with its record.
    """
    first: dict[Path, Record] = {}
    for record in records:
        if record.file is not None:
            first.setdefault(record.file, record)
    distinct = list(first.values())
    every = max(1, -(-len(distinct) // HEADERS))
    for n, record in enumerate(distinct):
        if not _looks_right(record, header=n % every == 0) and (error := look_at(record).error):
            raise error


def _looks_right(record: Record, *, header: bool) -> bool:
    try:
        if require_file(record.image, what="image").stat().st_size == 0:
            return False
        if header:
            with warnings.catch_warnings(action="ignore"), opened(record.image):
                pass
    except Exception:  # Pillow's plug-ins raise many kinds; what it is, the full look says
        return False
    return True
