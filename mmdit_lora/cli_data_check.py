"""The verb `data check`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_lora.cli_data import DeclaredFormat, DeclaredUnits, Images, JsonFlag, SkipMissing, emit, say
from mmdit_lora.errors import InputError

if TYPE_CHECKING:
    from mmdit_lora.data.check import CheckReport
    from mmdit_lora.data.records import Record

_ERRORS_SHOWN = 20


def register(data: typer.Typer) -> None:
    """Add the verb to the `data` app."""
    data.command("check")(check)


def check(
    data: Annotated[Path, typer.Argument(help="Data set folder.")],
    from_: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Check a set of another format (`data formats`).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="A split of the source.")] = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    out: Annotated[Path | None, typer.Option(help="Write check.json and check.html (with pictures) here.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another data set (the validation set) that must not hold the same pictures.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Pipeline folder or hub id: count tokens by its tokenizer, not by estimate.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Side of the training pictures in pixels: smaller pictures are listed.")
    ] = None,
    against_from: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Format of the set that --against names.  [default: --from]")
    ] = None,
    bbox_format: DeclaredFormat = None,
    bbox_units: DeclaredUnits = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a data set, decode its pictures, and say what is in it and what is wrong with it."""
    from mmdit_lora.data.check import check_dataset, clip_tokens, read_written
    from mmdit_lora.data.formats import read_format
    from mmdit_lora.data.records import scan_dataset

    if out is not None and out.exists() and not out.is_dir():
        raise InputError("is a file, not a folder", where=str(out), cure="give another --out")
    own_format, own_units = bbox_format or "xyxy", bbox_units or "relative"
    if against is None and against_from is not None:
        raise InputError("belongs to --against", where="--against-from", cure="leave it away, or give --against")
    other_format = against_from or from_ or "jsonl"
    # The conventions that were declared are of DATA; those of a set in another format are its own.
    same = other_format == (from_ or "jsonl")
    other_set = against and read_format(
        other_format,
        against,
        bbox_format=bbox_format if same else None,
        bbox_units=bbox_units if same else None,
        skip_missing=skip_missing,
    )
    others = other_set.records if other_set else []
    tokens = clip_tokens(base)
    if from_ not in (None, "jsonl"):
        source = read_format(
            from_,
            data,
            split=split,
            images=images,
            bbox_format=bbox_format,
            bbox_units=bbox_units,
            skip_missing=skip_missing,
            collect_errors=True,
        )
        records = source.records
        report = check_dataset(
            records,
            errors=source.errors,
            left_out=dict(source.left_out),
            warnings=source.warnings,
            against=others,
            tokens=tokens,
            resolution=resolution,
        )
    else:
        for option, value in (("--images", images), ("--split", split)):
            if value is not None:
                raise InputError("belongs to --from FORMAT", where=option, cure="leave it away")
        records, errors = scan_dataset(data, bbox_format=own_format, bbox_units=own_units)
        written = read_written(data, bbox_format=own_format, bbox_units=own_units)
        report = check_dataset(
            records, errors=errors, written=written, against=others, tokens=tokens, resolution=resolution
        )
    _print(report)
    if out is not None:
        _write(report, records, data, out)
    if as_json:
        emit(report.to_dict())
    _raise_errors(report, data)


def _print(report: CheckReport) -> None:
    if report.records:
        sizes = [f"{count} of {size}" for size, count in report.image_sizes.items()]
        more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
        say(
            f"{report.pictures} pictures, {report.records} layouts, {report.boxes} boxes, {report.phrases} distinct phrases"
        )
        say(f"sizes: {', '.join(sizes[:5])}{more}")
        say(f"boxes a picture: {', '.join(f'{boxes} ({n}x)' for boxes, n in report.boxes_per_picture.items())}")
        if report.extra_columns:
            say(f"ignored columns: {', '.join(f'{name} ({n}x)' for name, n in report.extra_columns.items())}")
        for note in report.notes:
            say(note)
    if report.findings:
        _print_table(report)
    for message in report.warnings:
        say(f"warning: {message}")


def _print_table(report: CheckReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", "finding", "count", "of"):
        table.add_column(title, justify="right" if title == "count" else "left", no_wrap=True)
    table.add_column("first", overflow="fold")
    for found in report.findings:
        first = found.examples[0].where.rpartition("/")[2] if found.examples else ""
        severity = Text(found.severity, style="red" if found.severity == "error" else "yellow")
        table.add_row(severity, found.name, str(found.count), f"{found.total} {found.unit}", Text(first))
    Console(stderr=True).print(table)


def _write(report: CheckReport, records: Iterable[Record], data: Path, out: Path) -> None:
    from mmdit_lora.data.check.page import page
    from mmdit_lora.files import write_json, write_text

    boxes = [box for record in records for box in record.layout.boxes]
    write_text(out / "check.html", page(report, title=str(data), boxes=boxes))
    write_json(out / "check.json", {"data": str(data), **report.to_dict()})
    say(f"wrote {out / 'check.html'} and {out / 'check.json'}")


def _raise_errors(report: CheckReport, data: Path) -> None:
    if len(report.errors) == 1:
        raise InputError(report.errors[0])
    if report.errors:
        shown = "\n".join(f"- {message}" for message in report.errors[:_ERRORS_SHOWN])
        head = f"{len(report.errors)} errors"
        if len(report.errors) > _ERRORS_SHOWN:
            head += f", the first {_ERRORS_SHOWN} of which are"
        raise InputError(f"{head}\n{shown}", where=str(data))
