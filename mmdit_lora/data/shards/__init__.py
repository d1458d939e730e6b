"""Data sets in shards: tar or parquet files, local or in any store that fsspec opens; what `data.path` names beside a folder."""

from __future__ import annotations

import os
from pathlib import Path

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.records import METADATA
from mmdit_lora.data.shapes import is_scenes
from mmdit_lora.data.shards.records import Part, ShardedRecords, ShardRecord, Subset, spread
from mmdit_lora.data.shards.store import expand, find, is_url

__all__ = [
    "ShardRecord",
    "ShardedRecords",
    "Subset",
    "is_sharded",
    "open_shards",
    "spread",
]

TAR, PARQUET = ".tar", ".parquet"


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a path means shards: a URL, a .tar or .parquet file or pattern, or a folder of such files without
    metadata.jsonl."""
    text = os.fspath(path)
    if is_url(text):
        return not is_scenes(text)
    folder = Path(text)
    if folder.is_dir():
        return not (folder / METADATA).is_file() and any(any(folder.glob(f"*{suffix}")) for suffix in (TAR, PARQUET))
    return text.endswith((TAR, PARQUET))


def open_shards(
    path: str | os.PathLike[str], *, bbox_format: str = "xyxy", bbox_units: str = "relative"
) -> ShardedRecords:
    """The records of shards, in the order of their names. A tar shard without index is looked through once.

    Args:
        path: a folder of .tar or .parquet files, one file, a glob, or a brace pattern such as `set-{000..009}.tar`; local, or a URL of
            fsspec (`s3://`, `https://` ...). bbox_format, bbox_units: as of `read_dataset`.

    Raises:
        InputError: there is no shard, one is damaged, or a record is wrong; with `shard:key`.
    """
    remarks, edges = list[str](), EdgeCount()
    suffix = _suffix(os.fspath(path))
    names = expand(os.fspath(path), suffix)
    if suffix == PARQUET:
        from mmdit_lora.data.shards.parquet_part import ParquetPart, RowGroups

        groups = RowGroups()
        return ShardedRecords(
            [
                ParquetPart(find(name), groups, bbox_format=bbox_format, bbox_units=bbox_units, edges=edges)
                for name in names
            ],
            edges=edges,
        )
    return ShardedRecords([_open(name, bbox_format, bbox_units, edges, remarks) for name in names], remarks, edges)


def _suffix(path: str) -> str:
    if not is_url(path) and Path(path).is_dir():
        return TAR if any(Path(path).glob(f"*{TAR}")) else PARQUET
    return PARQUET if path.endswith(PARQUET) else TAR  # of a folder in a store, tar


def _open(name: str, bbox_format: str, bbox_units: str, edges: EdgeCount, remarks: list[str]) -> Part:
    from mmdit_lora.data.shards.tar_part import TarPart

    def tell(line: str) -> None:
        if not remarks:  # of a folder that cannot be written to, each shard would say it
            remarks.append(line)

    return TarPart(find(name), bbox_format=bbox_format, bbox_units=bbox_units, edges=edges, tell=tell)
