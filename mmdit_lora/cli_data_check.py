"""The verb `data check`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_lora.cli_data import DeclaredFormat, DeclaredUnits, Images, JsonFlag, SkipMissing, emit, say
from mmdit_lora.cli_data_stats import SAMPLE
from mmdit_lora.cli_numbers import number
from mmdit_lora.errors import InputError, several
from mmdit_lora.outputs import check_new_folder, new_folder, refuse_inputs
from mmdit_lora.ranges import Range

if TYPE_CHECKING:
    from mmdit_lora.data.check import CheckReport
    from mmdit_lora.data.records import Record


def register(data: typer.Typer) -> None:
    """Add the verb to the `data` app."""
    data.command("check")(check)


def check(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA_OR_CONFIG",
            help="Data set folder, shards (tar, parquet: a folder, pattern or URL), or the YAML file of a run.",
        ),
    ],
    from_: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Check a set of another format (`data formats`).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="A split of the source.")] = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    out: Annotated[Path | None, typer.Option(help="Write check.json and check.html (with pictures) here.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another data set (the validation set) that must not hold the same pictures.")
    ] = None,
    against_from: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Format of the set that --against names.  [default: --from]")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Pipeline folder or hub id: count tokens by its tokenizer, not by estimate.")
    ] = None,
    resolution: Annotated[
        int | None,
        number(
            Range(16, 16_384, whole=True),
            "--resolution",
            help="Side of the training pictures in pixels: smaller pictures are listed.",
        ),
    ] = None,
    bbox_format: DeclaredFormat = None,
    bbox_units: DeclaredUnits = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a data set, decode its pictures, and say what is in it and what is wrong with it.

    With a run's config, it is judged as that run would use it: its buckets, its crop, its batch, its validation set.
    """
    from mmdit_lora.data.buckets import one_size
    from mmdit_lora.data.check import check_dataset, clip_tokens

    inputs: dict[str, str | Path | None] = {"DATA": data, "--images": images, "--against": against, "--base": base}
    if out is not None:
        check_new_folder(out, verb="data check", inputs=inputs)
    if against is None and against_from is not None:
        raise InputError("belongs to --against", where="--against-from", cure="leave it away, or give --against")
    judged: dict[str, Any] = {"buckets": None if resolution is None else one_size((resolution, resolution))}
    if data.endswith((".yaml", ".yml")):
        given = {"--from": from_, "--against": against, "--base": base, "--resolution": resolution}
        for option, value in (given | {"--bbox-format": bbox_format, "--bbox-units": bbox_units}).items():
            if value is not None:
                raise InputError("is said by the config", where=option, cure="leave it away")
        data, against, base, judged, (own_format, own_units) = _of_run(data)
    else:
        own_format, own_units = bbox_format, bbox_units
    tokens = clip_tokens(base)
    found = _read(data, from_, split, images, skip_missing, own_format, own_units)
    other_format = against_from or from_
    # The conventions that were declared are of DATA; those of a set in another format are its own.
    declared = (own_format, own_units) if other_format == from_ else (None, None)
    others = _read(against, other_format, None, None, skip_missing, *declared).records if against else []
    report = check_dataset(found.records, against=others, tokens=tokens, **judged, **found.told)
    report.notes.extend(found.notes)
    _print(report)
    if out is not None:
        refuse_inputs([out], {"DATA": data, "--against": against}, verb="data check")  # of the config
        _write(report, found.records, data, out)
    if as_json:
        emit(report.to_dict())
    _raise_errors(report, data)


@dataclass(frozen=True)
class _Found:
    """Records, what `check_dataset` is told of how they were read, and lines for people."""

    records: list[Record]
    told: dict[str, Any]
    notes: list[str]
    source: Any = None  # holds pictures that lay inside other files, as long as this lives


def _read(
    data: str,
    from_: str | None,
    split: str | None,
    images: Path | None,
    skip_missing: bool,
    bbox_format: str | None,
    bbox_units: str | None,
) -> _Found:
    from mmdit_lora.data.check import read_written
    from mmdit_lora.data.formats import read_format
    from mmdit_lora.data.records import scan_dataset
    from mmdit_lora.data.shards import is_sharded, sample_dataset
    from mmdit_lora.data.warnings import Warnings

    if from_ not in (None, "jsonl"):
        source = read_format(
            from_,
            Path(data),
            split=split,
            images=images,
            bbox_format=bbox_format,
            bbox_units=bbox_units,
            skip_missing=skip_missing,
            collect_errors=True,
        )
        told = {"errors": source.errors, "left_out": dict(source.left_out), "warnings": source.warnings}
        return _Found(source.records, told, list(source.remarks), source)
    for option, value in (("--images", images), ("--split", split)):
        if value is not None:
            raise InputError("belongs to --from FORMAT", where=option, cure="leave it away")
    conventions = {"bbox_format": bbox_format or "xyxy", "bbox_units": bbox_units or "relative"}
    if is_sharded(data):  # opening them reads every layout and every header, unless an index says it was done
        lines: list[str] = []
        records, total = sample_dataset(data, SAMPLE, **conventions, tell=lines.append)
        return _Found(
            records,
            {"warnings": lines},
            [f"{len(records)} of {total} records, evenly spread, are what the rest is about"],
        )
    warnings = Warnings()
    records, errors = scan_dataset(data, **conventions, warnings=warnings)
    written = read_written(Path(data), **conventions)
    return _Found(records, {"errors": errors, "written": written, "warnings": warnings.lines()}, [])


def _of_run(path: str) -> tuple[str, str | None, str, dict[str, Any], tuple[str | None, str | None]]:
    """Data, validation set, base, how the pictures are used, and the conventions, as a run's config has them."""
    from mmdit_lora.config import load_config
    from mmdit_lora.training.opening import open_encoders
    from mmdit_lora.training.run_data import run_buckets

    config = load_config(path)
    import torch

    section = config.data
    judged = {
        "buckets": run_buckets(config, open_encoders(config, torch.float32, texts=False)),
        "batch": config.train.batch_size * config.train.gradient_accumulation,
        "min_visible": section.min_visible,
    }
    return section.path, section.validation, config.base, judged, (section.bbox_format, section.bbox_units)


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


def _write(report: CheckReport, records: Iterable[Record], data: str, out: Path) -> None:
    from mmdit_lora.data.check.page import page
    from mmdit_lora.files import write_json, write_text

    boxes = [box for record in records for box in record.layout.boxes]
    with new_folder(out, verb="data check") as folder:
        write_text(folder / "check.html", page(report, title=data, boxes=boxes))
        write_json(folder / "check.json", {"data": data, **report.to_dict()})
    say(f"wrote {out / 'check.html'} and {out / 'check.json'}")


def _raise_errors(report: CheckReport, data: str) -> None:
    if len(report.errors) == 1:
        raise InputError("\n".join(filter(None, (report.errors[0], report.hint))))
    if report.errors:
        raise several([InputError(message.splitlines()[0]) for message in report.errors], where=data, hint=report.hint)
