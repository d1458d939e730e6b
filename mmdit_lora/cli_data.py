"""The verbs that work with data sets: `init`, `data make`, `data check`, `data convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmdit_lora import cli_cache
from mmdit_lora.errors import InputError, unknown_key

if TYPE_CHECKING:
    from mmdit_lora.data.check import CheckReport
    from mmdit_lora.data.records import Item, Record
    from mmdit_lora.data.voc import VocSet

_ERRORS_SHOWN = 20

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
BoxFormat = Annotated[
    Literal["xyxy", "xywh", "cxcywh"], typer.Option(help="How boxes are written where a line does not say it.")
]
BoxUnits = Annotated[Literal["relative", "pixel"], typer.Option(help="Units of boxes where a line does not say it.")]


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    data = typer.Typer(help="Make, check and convert data sets.", no_args_is_help=False)
    app.command("init")(init)
    data.command("make")(make)
    data.command("check")(check)
    data.command("convert")(convert)
    cli_cache.register(data)
    app.add_typer(data, name="data")


def init(
    data: Annotated[str, typer.Argument(help="Data set folder, with its metadata.jsonl.")],
    base: Annotated[str, typer.Option(help="Pipeline folder or hub id of the base.")] = "data/tiny_base",
    out: Annotated[Path | None, typer.Option(help="Write the config here instead of printing it.")] = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
) -> None:
    """Print a commented config for your own data set."""
    from mmdit_lora.data.init_config import commented_config
    from mmdit_lora.files import write_text

    if out is not None and out.exists():
        raise InputError("exists already", where=str(out), cure="give another --out, or remove it yourself")
    text = commented_config(data, base=base, bbox_format=bbox_format, bbox_units=bbox_units)
    if out is None:
        print(text, end="")
    else:
        _refuse_file_as_folder(out.parent)
        write_text(out, text)
        say(f"wrote {out}: start with `mmdit-lora train {out}`")


def make(
    kind: Annotated[
        Literal["shapes"], typer.Argument(help="shapes: coloured shapes on grey, with captions and phrases.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pictures.")] = 0,
    domain: Annotated[str, typer.Option(help="basic | dense | page | mixed")] = "basic",
    as_json: JsonFlag = False,
) -> None:
    """Make a procedural data set."""
    from mmdit_lora.data.shapes import DOMAINS, write_dataset

    if domain not in DOMAINS:
        raise unknown_key(domain, DOMAINS, where="--domain")
    _refuse_file_as_folder(out)
    write_dataset(out, DOMAINS[domain], count=count, seed=seed)
    say(f"wrote {count} pictures of {kind} ({domain}) to {out}")
    if as_json:
        emit({"out": str(out), "records": count, "kind": kind, "domain": domain, "seed": seed})


def check(
    data: Annotated[Path, typer.Argument(help="Data set folder.")],
    from_: Annotated[Literal["voc"] | None, typer.Option("--from", help="Check a folder of another format.")] = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Read a data set, decode its pictures, and say what is in it and what is wrong with it."""
    from mmdit_lora.data.check import check_dataset
    from mmdit_lora.data.records import scan_dataset
    from mmdit_lora.data.voc import scan_voc

    if from_ == "voc":
        voc = scan_voc(data, collect_errors=True)
        report = check_dataset(voc.records, errors=voc.errors, left_out=dict(voc.left_out))
    else:
        records, errors = scan_dataset(data, bbox_format=bbox_format, bbox_units=bbox_units)
        report = check_dataset(records, errors=errors)
    for line in _report_lines(report):
        say(line)
    if as_json:
        emit(report.to_dict())
    _raise_errors(report, data)


def convert(
    src: Annotated[Path, typer.Argument(help="Folder to convert.")],
    from_: Annotated[Literal["voc"], typer.Option("--from", help="Its format.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    caption: Annotated[
        str | None, typer.Option(help="Template of the captions.  [default: a photo of {phrases}]", show_default=False)
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=PHRASE", help="Phrase of a class; may be given many times."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="A split of the source (VOC: a file in ImageSets/Main).")] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Write OUT/train and OUT/validation, the latter with this share.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a data set of another format."""
    from mmdit_lora.data.records import write_dataset, write_splits
    from mmdit_lora.data.voc import DEFAULT_CAPTION, scan_voc

    del from_  # one format so far; Typer has refused any other
    if holdout is not None and not 0 < holdout < 1:
        raise InputError(f"is {holdout}", where="--holdout", cure="give a share between 0 and 1, e.g. 0.2")
    _refuse_file_as_folder(out)
    template = DEFAULT_CAPTION if caption is None else caption
    voc = scan_voc(src, split, caption=template, phrases=_phrase_map(map_ or []))
    if not voc.records:
        raise InputError("holds no picture with a box", where=str(src))
    if holdout is None:
        write_dataset(out, _items(voc.records))
        counts = {"records": len(voc.records)}
    else:
        parts = _held_out(voc.records, holdout, src)
        write_splits(out, {name: _items(records) for name, records in parts.items()})
        counts = {"records": len(voc.records), **{name: len(records) for name, records in parts.items()}}
    for line in _voc_lines(voc, split):
        say(line)
    say(f"wrote {', '.join(f'{count} {name}' for name, count in counts.items())} to {out}")
    if as_json:
        boxes = sum(len(record.layout.boxes) for record in voc.records)
        emit(
            {
                "out": str(out),
                **counts,
                "boxes": boxes,
                "left_out": voc.left_out,
                "pixels_from": 0 if voc.from_zero else 1,
            }
        )


def say(message: str) -> None:
    """A line for people, on stderr: stdout is for what was asked for."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False, emoji=False)


def emit(data: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`."""
    json.dump(data, sys.stdout, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def _report_lines(report: CheckReport) -> list[str]:
    sizes = [f"{count} of {size}" for size, count in report.image_sizes.items()]
    more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    lines = [
        f"{report.pictures} pictures, {report.records} layouts, {report.boxes} boxes, {report.phrases} distinct phrases",
        f"sizes: {', '.join(sizes[:5])}{more}",
        f"boxes a picture: {', '.join(f'{boxes} ({count}x)' for boxes, count in report.boxes_per_picture.items())}",
    ]
    if report.extra_columns:
        lines.append(
            f"ignored columns: {', '.join(f'{name} ({count}x)' for name, count in report.extra_columns.items())}"
        )
    return [*(lines if report.records else []), *(f"warning: {message}" for message in report.warnings)]


def _raise_errors(report: CheckReport, data: Path) -> None:
    if len(report.errors) == 1:
        raise InputError(report.errors[0])
    if report.errors:
        shown = "\n".join(f"- {message}" for message in report.errors[:_ERRORS_SHOWN])
        head = f"{len(report.errors)} errors"
        if len(report.errors) > _ERRORS_SHOWN:
            head += f", the first {_ERRORS_SHOWN} of which are"
        raise InputError(f"{head}\n{shown}", where=str(data))


def _voc_lines(voc: VocSet, split: str | None) -> list[str]:
    lines = [f"warning: {count} {what} were left out" for what, count in voc.left_out.items()]
    if voc.from_zero:
        lines.append("pixels were taken to be counted from 0: a box begins there, which VOC's own count from 1 forbids")
    if split is None and voc.splits:
        lines.append(f"every annotation was read; --split takes {', '.join(voc.splits)}")
    return lines


def _phrase_map(pairs: Iterable[str]) -> dict[str, str]:
    phrases = {}
    for pair in pairs:
        name, equals, phrase = pair.partition("=")
        if not equals or not name.strip() or not phrase.strip():
            raise InputError(
                f"is {pair!r}", where="--map", cure='write a class and its phrase: --map RBC="a red blood cell"'
            )
        phrases[name.strip()] = phrase.strip()
    return phrases


def _items(records: Iterable[Record]) -> Iterable[Item]:
    return [(record.image.name, record.image, record.layout) for record in records]


def _held_out(records: list[Record], share: float, src: Path) -> dict[str, list[Record]]:
    """Train and validation by the hash of the file's stem: the same pictures on every machine, in no order of theirs."""
    import hashlib

    stems = sorted({record.image.stem for record in records}, key=lambda stem: hashlib.blake2b(stem.encode()).digest())
    if len(stems) < 2:
        raise InputError(
            "holds a single picture: none is left to hold out", where=str(src), cure="leave --holdout away"
        )
    held = set(stems[: min(max(1, round(share * len(stems))), len(stems) - 1)])
    return {
        "train": [record for record in records if record.image.stem not in held],
        "validation": [record for record in records if record.image.stem in held],
    }


def _refuse_file_as_folder(path: Path) -> None:
    for part in (path, *path.absolute().parents):
        if part.exists():
            if not part.is_dir():
                raise InputError("is a file, not a folder", where=str(part), cure="give another --out")
            return
