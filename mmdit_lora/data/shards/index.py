"""What is known of a shard without reading it: one row a record, mapped from a file beside the shard.

`NAME.tar.index.safetensors` holds one tensor "rows" (records, bytes of a row) uint8; its header says how a row is read
(a NumPy structured type) and of which shard it is. Text is not in it: a layout is parsed when its record is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mmdit_lora.data.shards.store import Stored
from mmdit_lora.files import atomic_file

VERSION = "1"
SUFFIX = ".index.safetensors"
# Places are counted in tar's blocks of 512 bytes, so that 32 bits reach 2 TB. `content` and `meta` are XXH3 (64 bits) of the
# picture's file and of what says the layout; `boxes` is how many the latter has.
_FIELDS = [
    *((name, "<u4") for name in ("picture", "picture_bytes", "json", "json_bytes", "text", "text_bytes")),
    *((name, "<u4") for name in ("width", "height", "boxes")),
    *((name, "<u8") for name in ("content", "meta")),
]


def row_type(longest_name: int) -> np.dtype:
    """The type of a row; `name` is the picture's member name as UTF-8, padded."""
    return np.dtype([*_FIELDS, ("name", f"S{max(1, longest_name)}")])


def index_path(shard: Stored) -> Path:
    """Where a local shard's index lies."""
    return Path(shard.name + SUFFIX)


def save_index(shard: Stored, rows: np.ndarray, conventions: str) -> None:
    """Write a shard's index beside it. Raises `OSError` where the folder cannot be written to."""
    header = {
        "shard": json.dumps({**_stamp(shard, conventions), "row": rows.dtype.descr})
    }  # one key: their order varies
    with atomic_file(index_path(shard)) as temporary:
        save_file({"rows": rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)}, temporary, metadata=header)


def load_index(shard: Stored, conventions: str) -> np.ndarray | None:
    """The rows of a local shard, mapped; None where there is no index, or not of the shard as it is now.

    Args:
        conventions: how boxes are read where a record does not say it; layouts were checked under these.
    """
    path = index_path(shard)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 10**6 else {}
        found, rows = json.loads(header["__metadata__"]["shard"]), header["rows"]
        if {key: found.get(key) for key in _stamp(shard, conventions)} != _stamp(shard, conventions):
            return None
        kind = np.dtype([tuple(entry) for entry in found["row"]])
        count, width = rows["shape"]
        first, last = rows["data_offsets"]
        if rows["dtype"] != "U8" or kind.itemsize != width or last - first != count * width:
            return None
        if path.stat().st_size != 8 + length + last:
            return None
        return np.memmap(path, dtype=kind, mode="r", offset=8 + length + first, shape=(count,))
    except (OSError, ValueError, LookupError, TypeError, SyntaxError, SafetensorError):
        return None  # whatever it is, a new one is made


def _stamp(shard: Stored, conventions: str) -> dict[str, str]:
    return {"version": VERSION, "size": str(shard.size), "stamp": shard.stamp, "boxes": conventions}
