"""What a path names: a data set (a folder, shards, or scenes that are generated), or layouts alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmdit_lora.data.images import image_size
from mmdit_lora.data.records import Record, read_dataset, warn
from mmdit_lora.data.shapes import is_scenes, open_scenes
from mmdit_lora.data.shards import ShardedRecords, is_sharded, open_shards, spread
from mmdit_lora.layout import Layout, read_layouts


def open_dataset(
    path: str | os.PathLike[str],
    *,
    bbox_format: str = "xyxy",
    bbox_units: str = "relative",
    on_warning: Callable[[str], None] = warn,
) -> Sequence[Record]:
    """The records of a data set folder, of shards (tar, parquet), or of `shapes://DOMAIN?count=N&seed=S`.

    Args:
        bbox_format, bbox_units, on_warning: as of `read_dataset`.

    Raises:
        InputError: as of `read_dataset`, `open_shards` and `open_scenes`.
    """
    if is_scenes(path):
        return open_scenes(str(path))
    if is_sharded(path):
        return open_shards(path, bbox_format=bbox_format, bbox_units=bbox_units)
    return read_dataset(os.fspath(path), bbox_format=bbox_format, bbox_units=bbox_units, on_warning=on_warning)


def sample_dataset(
    path: str | os.PathLike[str],
    most: int,
    *,
    bbox_format: str = "xyxy",
    bbox_units: str = "relative",
    on_warning: Callable[[str], None] = warn,
) -> tuple[Sequence[Record], int]:
    """(records, how many there are): all of a folder or of scenes; of shards at most `most`, evenly spread.

    Args and errors as of `open_dataset`.
    """
    records = open_dataset(path, bbox_format=bbox_format, bbox_units=bbox_units, on_warning=on_warning)
    if not isinstance(records, ShardedRecords):
        return records, len(records)
    sample = spread(records, most)
    for line in records.remarks:
        on_warning(line)
    return sample, len(records)


def open_layouts(path: str | Path) -> list[Layout]:
    """The layouts of a layout file, or of a data set folder.

    Raises:
        InputError: as of `read_dataset` and `read_layouts`.
    """
    if Path(path).is_dir():
        return [record.layout for record in read_dataset(path)]
    return read_layouts(path, image_size=image_size)
