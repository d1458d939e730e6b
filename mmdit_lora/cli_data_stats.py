"""The verb `data stats`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_lora.cli_data import BoxFormat, BoxUnits, JsonFlag, emit, say

if TYPE_CHECKING:
    from mmdit_lora.data.stats import Stats

_PHRASES_SHOWN = 12

SAMPLE = 10_000  # records of shards that are looked at

DataOrShards = Annotated[
    str,
    typer.Argument(
        help="Data set folder; or shards (tar, parquet): a folder, pattern or URL, of which a sample is looked at."
    ),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="KEY=VALUE",
        help="A rule of the config's data.filter, e.g. min_area=0.01; may be given again.",
    ),
]


def register(data: typer.Typer) -> None:
    """Add the verb to `data`."""
    data.command("stats")(stats)


def stats(
    data: DataOrShards,
    filter_: FilterOption = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Say how large pictures and boxes are, how many, and what the phrases are; with a filter, of what it leaves."""
    from mmdit_lora.data.filters import filter_records, parse_filter
    from mmdit_lora.data.shards import sample_dataset
    from mmdit_lora.data.stats import dataset_stats

    rules = parse_filter(filter_ or [])
    records, total = sample_dataset(data, SAMPLE, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, where="--filter")
    found = dataset_stats(filtered.records)
    if len(records) < total:
        say(f"of {total} records {len(records)} were looked at, evenly spread")
    for line in _lines(found):
        say(line)
    if filtered.summary:
        say(f"warning: {filtered.summary}")
    if as_json:
        emit({**found.to_dict(), "records": total, "looked_at": len(records), "filter": filtered.to_dict()})


def _lines(found: Stats) -> Iterator[str]:
    yield (
        f"{found.pictures} pictures, {found.layouts} layouts, {found.boxes} boxes, "
        f"{found.distinct_phrases} distinct phrases"
    )
    counts = ", ".join(f"{boxes} ({count}x)" for boxes, count in found.boxes_per_layout.items())
    yield f"boxes a layout: {counts}"
    yield f"{'':24}" + "".join(f"{name:>9}" for name in ("min", "q05", "q25", "median", "q75", "q95", "max"))
    rows = {
        "width, pixels": found.width,
        "height, pixels": found.height,
        "width / height": found.aspect,
        "box's share of picture": found.box_area,
        "box's width / height": found.box_aspect,
        "words a caption": found.caption_words,
    }
    for name, spread in rows.items():
        if spread is not None:
            yield f"{name:24}" + "".join(f"{value:>9.4g}" for value in spread.values())
    for phrase, count in list(found.phrases.items())[:_PHRASES_SHOWN]:
        yield f"{count:>7}x {phrase}"
    if found.distinct_phrases > _PHRASES_SHOWN:
        yield f"         and {found.distinct_phrases - _PHRASES_SHOWN} other phrases"
