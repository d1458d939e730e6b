"""The verb `data split`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmdit_lora.cli_data import BoxFormat, BoxUnits, JsonFlag, emit, say
from mmdit_lora.cli_numbers import number
from mmdit_lora.outputs import check_new_folder
from mmdit_lora.ranges import PART

if TYPE_CHECKING:
    from mmdit_lora.data.records import Item, Record


def register(data: typer.Typer) -> None:
    """Add the verb to `data`."""
    data.command("split")(split)


def split(
    data: Annotated[Path, typer.Argument(help="Data set folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: OUT/train and OUT/validation.")],
    share: Annotated[float, number(PART, "--share", help="Share of the pictures that is for validation.")] = 0.1,
    by: Annotated[
        Literal["name", "picture"],
        typer.Option(help="name: by the hash of the file name; picture: of the pixels, so that copies stay together."),
    ] = "name",
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Part a data set in two, the same way each time; all layouts of a picture go to one side."""
    from mmdit_lora.data.partition import partition
    from mmdit_lora.data.records import read_dataset, write_splits

    check_new_folder(out, verb="data split", inputs={"DATA": data})
    records = read_dataset(data, bbox_format=bbox_format, bbox_units=bbox_units)
    train, validation = partition(records, share, by=by)
    write_splits(out, {"train": _items(train, data), "validation": _items(validation, data)}, verb="data split")
    extra = Counter(column for record in records for column in record.extra)
    if extra:
        say(f"warning: columns that mean nothing here were not written: {', '.join(sorted(extra))}")
    counts = {"records": len(records), "train": len(train), "validation": len(validation)}
    say(f"wrote {len(train)} layouts to {out / 'train'}, {len(validation)} to {out / 'validation'}")
    if as_json:
        emit({"out": str(out), "by": by, **counts})


def _items(records: list[Record], folder: Path) -> list[Item]:
    return [(record.image.relative_to(folder).as_posix(), record.image, record.layout) for record in records]
