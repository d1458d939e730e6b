"""Read back what W&B wrote offline, from the bytes of the run file.

It is LevelDB's log with a header of 7 bytes: blocks of 32 KiB of chunks, each a checksum (4 bytes), a length (2), a type
(1: whole record, 2: first part, 3: middle, 4: last) and the data.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


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


@dataclass
class OfflineRun:
    """One run folder.

    Args:
        run_id: the id in the run's record.
        project: likewise.
        history: one dict for each `run.log`, in order, with W&B's own keys (`_step`, ...) left out.
        summary: the last value of each key set by hand or by logging.
        config: the config, nested; `_wandb` left out.
        files: the folder under which media paths lie.
        exit_code: None if the run never finished.
    """

    run_id: str = ""
    project: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: Path = Path()
    exit_code: int | None = None

    def series(self, key: str) -> dict[int, float]:
        """step -> value of a scalar; the last one where a step was logged twice."""
        return {row["step"]: row[key] for row in self.history if key in row}

    def images(self, key: str) -> dict[int, list[dict[str, Any]]]:
        """step -> images logged under `key`, each {"path", "caption", "boxes"}; boxes as W&B's box JSON holds them."""
        return {row["step"]: list(self._images(row[key])) for row in self.history if key in row}

    def _images(self, value: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert value["_type"] == "images/separated", value["_type"]
        captions = value.get("captions") or [None] * value["count"]
        boxes = value.get("all_boxes") or [None] * value["count"]
        for name, caption, groups in zip(value["filenames"], captions, boxes, strict=True):
            listed = json.loads((self.files / groups["layout"]["path"]).read_text())["box_data"] if groups else []
            yield {"path": self.files / name, "caption": caption, "boxes": listed}


def read_offline_run(folder: str | Path) -> OfflineRun:
    """The one offline run under `folder` (a folder that was given to `wandb.init(dir=...)`, or the run's own).

    Raises:
        AssertionError: there is not exactly one run, or its file is damaged.
    """
    runs = read_offline_runs(folder)
    assert len(runs) == 1, f"{len(runs)} offline runs under {folder}"
    return runs[0]


def read_offline_runs(folder: str | Path) -> list[OfflineRun]:
    """All offline runs under `folder`, the oldest first: a resumed run has one for each start, all of one id."""
    # The folder's time has whole seconds; the file's own breaks the tie.
    paths = sorted(Path(folder).rglob("run-*.wandb"), key=lambda path: (path.parent.name[:27], path.stat().st_mtime_ns))
    return [_read(path) for path in paths if not path.parent.is_symlink()]


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun(files=path.parent / "files")
    for data in records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            row = {key: value for key, value in row.items() if not key.startswith("_")}
            if row:
                run.history.append(row)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    run.config.pop("_wandb", None)
    return run


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        place, keys = target, list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
