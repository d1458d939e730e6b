"""Data sets in shards: tar or parquet files, local or in any store that fsspec opens; what `data.path` names beside a folder.

Why not a library. A record is asked for by its number here, since the order of a run is a function of (seed, position), a run
resumes at any position, buckets choose what is beside what, and layouts must be checked before the first step. What libraries
offer for a million images in a store are streams: `datasets` (streaming) and `webdataset` shuffle in a buffer, so the order
depends on how many workers and processes there are; their state, and that of torchdata's `StatefulDataLoader`, is a place in
such a stream, which is replayed, for one number of workers. `datasets` by number needs the set converted and on a local disk;
MosaicML's `streaming` resumes exactly, from its own format. So the readers here are ours, over tarfile, pyarrow and fsspec;
workers, prefetching and pinning are PyTorch's `DataLoader` (`data/dataset.py`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.records import METADATA
from mmdit_lora.data.shapes import is_scenes
from mmdit_lora.data.shards.records import Part, ShardedRecords, ShardRecord, Subset, spread
from mmdit_lora.data.shards.store import expand, find, is_url

__all__ = ["ShardRecord", "ShardedRecords", "Subset", "is_sharded", "open_shards", "spread"]

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
        path: a folder of .tar or .parquet files, one file, a glob, or a brace pattern such as `set-{000..009}.tar`; local, or
            a URL of fsspec (`s3://`, `https://` ...). bbox_format, bbox_units: as of `read_dataset`.

    Raises:
        InputError: there is no shard, one is damaged, or a record is wrong; with `shard:key`.
    """
    text, remarks, edges = os.fspath(path), list[str](), EdgeCount()
    suffix = PARQUET if text.endswith(PARQUET) else TAR  # of a folder in a store, tar
    if not is_url(text) and Path(text).is_dir():
        suffix = TAR if any(Path(text).glob(f"*{TAR}")) else PARQUET

    def on_warning(line: str) -> None:
        if not remarks:  # of a folder that cannot be written to, each shard would say it
            remarks.append(line)

    stored = [find(name) for name in expand(text, suffix)]
    parts: list[Part]
    if suffix == PARQUET:
        from mmdit_lora.data.shards.parquet import ParquetPart  # pyarrow is optional

        groups = OrderedDict[tuple[str, int], object]()
        parts = [ParquetPart(s, groups, bbox_format=bbox_format, bbox_units=bbox_units, edges=edges) for s in stored]
    else:
        from mmdit_lora.data.shards.tar import TarPart

        parts = [
            TarPart(s, bbox_format=bbox_format, bbox_units=bbox_units, edges=edges, on_warning=on_warning)
            for s in stored
        ]
    return ShardedRecords(parts, remarks, edges)
