"""What is known of a shard without reading it: one row a record, mapped from a file beside the shard.

`NAME.tar.index.safetensors` holds one tensor "rows" (records, bytes of a row) uint8; its header says how a row is read
(a NumPy structured type) and of which shard it is. Text is not in it: a layout is parsed when its record is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.shards.store import Stored
from mmdit_lora.errors import InputError
from mmdit_lora.files import atomic_file, require_file

VERSION = "2"
SUFFIX = ".index.safetensors"
_MOST_HEADER = 10**6  # bytes
_UNUSABLE = (InputError, OSError, ValueError, LookupError, TypeError, SyntaxError, AttributeError, RecursionError)
# Places are counted in tar's blocks of 512 bytes, so that 32 bits reach 2 TB. `content` and `meta` are XXH3 (64 bits) of the
# image's file and of what says the layout; `boxes` is how many the latter has; `key` says which side of a split it is on.
_FIELDS = [
    *((name, "<u4") for name in ("image", "image_bytes", "json", "json_bytes", "text", "text_bytes")),
    *((name, "<u4") for name in ("width", "height", "boxes")),
    *((name, "<u8") for name in ("content", "meta", "key")),
]


def row_type(longest_name: int) -> np.dtype:
    """The type of a row; `name` is the image's member name as UTF-8, padded."""
    return np.dtype([*_FIELDS, ("name", f"S{max(1, longest_name)}")])


def index_path(shard: Stored) -> Path:
    """Where a local shard's index lies."""
    return Path(shard.name + SUFFIX)


def save_index(shard: Stored, rows: np.ndarray, conventions: str, edges: EdgeCount | None = None) -> None:
    """Write a shard's index beside it. Raises `OSError` where the folder cannot be written to.

    Args:
        edges: the boxes that were clipped, which is said at every opening.
    """
    stamp: dict[str, Any] = {**_stamp(shard, conventions), "row": rows.dtype.descr, "xxh3": _checksum(rows)}
    if edges is not None and edges.boxes:
        stamp["clipped"] = vars(edges)
    header = {"shard": json.dumps(stamp)}  # one key: the order of several varies
    with atomic_file(index_path(shard)) as temporary:
        save_file({"rows": rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)}, temporary, metadata=header)


def load_index(shard: Stored, conventions: str) -> tuple[np.ndarray | None, EdgeCount]:
    """The rows of a local shard, mapped, and its clipped boxes; None where there is no index, or not of the shard as it is now.

    Args:
        conventions: how boxes are read where a record does not say it; layouts were checked under these.
    """
    path = index_path(shard)
    try:
        with require_file(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _MOST_HEADER))
        kind, count, first, wanted, edges = _described(header, _stamp(shard, conventions))
        if path.stat().st_size != 8 + length + first + count * kind.itemsize:
            return None, EdgeCount()
        mapped = np.memmap(path, dtype=kind, mode="r", offset=8 + length + first, shape=(count,))
        if _checksum(mapped) == wanted:
            return mapped, edges
    except _UNUSABLE:
        pass  # whatever it is, a new one is made
    return None, EdgeCount()


def fetch_index(shard: Stored, conventions: str) -> tuple[np.ndarray | None, EdgeCount]:
    """As `load_index`, of a remote shard, in memory. That a shard is of the same size has to do there: uploading changes its time,
    and whatever is read later is compared with the index's hashes."""
    try:
        data = shard.neighbour(SUFFIX)
        length = int.from_bytes(data[:8], "little")
        kind, count, first, wanted, edges = _described(data[8 : 8 + length], _stamp(shard, conventions), "stamp")
        rows = np.frombuffer(data, dtype=kind, count=count, offset=8 + length + first)
        if _checksum(rows) == wanted:
            return rows, edges
    except _UNUSABLE:
        pass
    return None, EdgeCount()


def _described(header: bytes, wanted: dict[str, str], *but: str) -> tuple[np.dtype, int, int, str, EdgeCount]:
    """(type of a row, how many, where they begin behind the header, their checksum, clipped boxes).

    Raises one of `_UNUSABLE`.
    """
    entries = json.loads(header)
    found, rows = json.loads(entries["__metadata__"]["shard"]), entries["rows"]
    if any(found[key] != value for key, value in wanted.items() if key not in but):
        raise ValueError("of another shard")
    kind = np.dtype([tuple(entry) for entry in found["row"]])
    count, width = rows["shape"]
    first, last = rows["data_offsets"]
    if (
        kind != row_type(kind["name"].itemsize)
        or rows["dtype"] != "U8"
        or kind.itemsize != width
        or last - first != count * width
    ):
        raise ValueError("not as it is written here")
    clipped = found.get("clipped", {})
    edges = EdgeCount(
        int(clipped.get("boxes", 0)), float(clipped.get("most", 0)), [*map(str, clipped.get("places", []))]
    )
    return kind, count, first, found["xxh3"], edges


def _checksum(rows: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(rows.view(np.uint8).data)


def _stamp(shard: Stored, conventions: str) -> dict[str, str]:
    return {"version": VERSION, "size": str(shard.size), "stamp": shard.stamp, "boxes": conventions}
