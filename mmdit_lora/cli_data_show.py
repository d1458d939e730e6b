"""The verb `data show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdit_lora.cli_data import BoxFormat, BoxUnits, JsonFlag, emit, say
from mmdit_lora.cli_data_stats import SAMPLE, DataOrShards, FilterOption
from mmdit_lora.cli_numbers import number
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import check_new_file
from mmdit_lora.ranges import Range


def register(data: typer.Typer) -> None:
    """Add the verb to `data`."""
    data.command("show")(show)


def show(
    data: DataOrShards,
    out: Annotated[str, typer.Option(metavar="PATH", help="The .png to write.")],
    count: Annotated[
        int, number(Range(1, 400, whole=True), "--count", help="Layouts to show, taken evenly from the whole set.")
    ] = 16,
    cell: Annotated[
        int, number(Range(64, 1024, whole=True), "--cell", help="Longer side of each picture in pixels.")
    ] = 256,
    filter_: FilterOption = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Draw a contact sheet: pictures with their boxes, phrases and captions."""
    from mmdit_lora.data.filters import filter_records, parse_filter
    from mmdit_lora.data.shards import sample_dataset
    from mmdit_lora.evaluate.canvas import fit
    from mmdit_lora.evaluate.draw import contact_sheet, is_marked_png, save_png

    if Path(out).suffix.lower() != ".png":
        raise InputError("is no .png", where=f"--out {out}", cure="give a file name that ends in .png")
    check_new_file(out, verb="data show", inputs={"DATA": data}, is_own=is_marked_png)
    rules = parse_filter(filter_ or [])
    most = SAMPLE if filter_ else count
    records, whole = sample_dataset(data, most, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, where="--filter")
    kept = len(filtered.records)
    shown = min(count, kept)
    chosen = [filtered.records[index * kept // shown] for index in range(shown)]
    total = kept if filter_ else whole
    images = [fit(record.load(), cell) for record in chosen]  # one at its full size at a time
    title = f"{Path(data).resolve().name}: {shown} of {total} layouts"
    sheet = contact_sheet(
        images,
        [record.layout for record in chosen],
        captions=[f"{record.name}: {record.layout.caption}" for record in chosen],
        title=title,
        cell=cell,
    )
    save_png(sheet, out, mark=True)
    if filtered.summary:
        say(f"warning: {filtered.summary}")
    say(f"wrote {shown} of {total} layouts to {out}")
    if as_json:
        emit({"out": str(out), "shown": [str(r.image) for r in chosen], "layouts": total, "filter": filtered.to_dict()})
