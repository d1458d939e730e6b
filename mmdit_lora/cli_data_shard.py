"""The verb `data shard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdit_lora.cli_cache import parse_bytes
from mmdit_lora.cli_data import BoxFormat, BoxUnits, JsonFlag, emit, say
from mmdit_lora.cli_data_stats import FilterOption
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import check_new_folder

_LARGEST = 2**40  # bytes; places in an index reach twice as far


def register(data: typer.Typer) -> None:
    """Add the verb to `data`."""
    data.command("shard")(shard)


def shard(
    data: Annotated[Path, typer.Argument(help="Data set folder, with its metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder to write: shard-000000.tar, ... and an index of each.")],
    size: Annotated[str, typer.Option(help="A shard is full at so many bytes.")] = "500MB",
    filter_: FilterOption = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Write a data set as tar shards (webdataset's convention): a few large files, read from any store without a list in memory."""
    from mmdit_lora.data.filters import filter_records, parse_filter
    from mmdit_lora.data.records import read_dataset
    from mmdit_lora.data.shards.write import write_shards

    most = parse_bytes(size, where="--size")
    if not 0 < most <= _LARGEST:
        raise InputError(f"is {size}", where="--size", cure="give from 1 to 1TiB, e.g. 500MB")
    check_new_folder(out, verb="data shard", inputs={"DATA": data})
    rules = parse_filter(filter_ or [])
    records = read_dataset(data, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, where="--filter")
    written = write_shards(out, filtered.records, size=most)
    if filtered.summary:
        say(f"warning: {filtered.summary}")
    shards = "1 shard" if written.shards == 1 else f"{written.shards} shards"
    say(f"wrote {written.records} records in {shards} to {out}")
    if as_json:
        emit({"out": str(out), "records": written.records, "shards": written.shards, "filter": filtered.to_dict()})
