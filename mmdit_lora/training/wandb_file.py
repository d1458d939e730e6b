"""What a W&B run file holds: wandb ships the messages, but no Python reader of the file around them (seen, 0.31).

The format is LevelDB's log with a header of 7 bytes: blocks of 32 KiB of chunks, each a checksum (4 bytes), a length (2), a
type (1: whole record, 2: first part, 3: middle, 4: last) and the data. W&B writes whole blocks: of a run that is killed, the
rows of the last one are lost (seen, 0.31: 91 of 200 rows, although the last was logged 5 s before).
"""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7

logger = logging.getLogger(__name__)


def records(data: bytes) -> Iterator[bytes]:
    """The serialised `wandb_internal_pb2.Record`s of a run file, up to where a killed run stopped writing.

    Raises:
        ValueError: it is no run file, or damaged.
    """
    if data[:4] != b":W&B":
        raise ValueError("not a W&B run file")
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block that is too short for a chunk is padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + HEADER : position + HEADER + length]
        if kind not in (1, 2, 3, 4):
            raise ValueError(f"a chunk of kind {kind} at byte {position}")
        if len(chunk) < length:  # the run was killed while it wrote; what came before is whole
            return
        if checksum != zlib.crc32(bytes([kind]) + chunk):
            raise ValueError(f"wrong checksum at byte {position}")
        parts = chunk if kind in (1, 2) else parts + chunk
        position += HEADER + length
        if kind in (1, 4):
            yield parts


def logged_keys(files: Iterable[Path]) -> set[tuple[int, str]] | None:
    """(value of the column `step`, name of another column) of all rows; None where a file is of another format."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: set[tuple[int, str]] = set()
    for file in files:
        try:
            for data in records(file.read_bytes() if file.is_file() else b":W&B"):
                record = Record.FromString(data)
                if record.WhichOneof("record_type") == "history":
                    names = {(list(item.nested_key) or [item.key])[0]: item.value_json for item in record.history.item}
                    step = json.loads(names.get("step", "-1"))
                    found |= {(step, name) for name in names if name != "step" and not name.startswith("_")}
        except Exception as error:
            logger.warning("%s is not read: %s", file, error)
            return None
    return found
