"""The verbs that work with data sets: `init`, `data make`, `data check`, `data convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmdit_lora import cli_cache, cli_data_formats
from mmdit_lora.cli_numbers import number
from mmdit_lora.errors import InputError, clip, shown, unknown_key
from mmdit_lora.files import json_text
from mmdit_lora.outputs import check_new_file, check_new_folder
from mmdit_lora.ranges import COUNT, PART, SEED

if TYPE_CHECKING:
    from mmdit_lora.data.records import Item, Record

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
BoxFormat = Annotated[
    Literal["xyxy", "xywh", "cxcywh"], typer.Option(help="How boxes are written where a line does not say it.")
]
BoxUnits = Annotated[
    Literal["relative", "pixel", "permille"], typer.Option(help="Units of boxes where a line does not say it.")
]
DeclaredFormat = Annotated[
    Literal["xyxy", "xywh", "cxcywh"] | None,
    typer.Option(help="Order of a box's numbers, where neither the format nor a line says it (jsonl: xyxy)."),
]
DeclaredUnits = Annotated[
    Literal["relative", "pixel", "permille"] | None,
    typer.Option(help="Units of boxes, where neither the format nor a line says it (jsonl: relative)."),
]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave records out whose picture is not there.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures, where they lie apart.")]


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    from mmdit_lora import (
        cli_data_check,
        cli_data_shard,
        cli_data_show,
        cli_data_split,
        cli_data_stats,
    )  # import from here

    data = typer.Typer(help="Make, check, convert, split, shard and show data sets.", no_args_is_help=False)
    app.command("init")(init)
    data.command("make")(make)
    data.command("convert")(convert)
    for file in (
        cli_data_formats,
        cli_data_check,
        cli_data_split,
        cli_data_stats,
        cli_data_show,
        cli_data_shard,
        cli_cache,
    ):
        file.register(data)
    app.add_typer(data, name="data")


def init(
    data: Annotated[str, typer.Argument(help="Data set folder, with its metadata.jsonl.")],
    base: Annotated[str, typer.Option(help="Pipeline folder or hub id of the base.")] = "data/tiny_base",
    out: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the config here instead of printing it.")
    ] = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
) -> None:
    """Print a commented config for your own data set."""
    from mmdit_lora.data.init_config import commented_config
    from mmdit_lora.files import write_text

    if out is not None:
        check_new_file(out, verb="init", inputs={"DATA": data, "--base": base})
    text = commented_config(data, base=base, bbox_format=bbox_format, bbox_units=bbox_units)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
        say(f"wrote {out}: start with `mmdit-lora train {out}`")


def make(
    kind: Annotated[
        Literal["shapes"], typer.Argument(help="shapes: coloured shapes on grey, with captions and phrases.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    count: Annotated[int, number(COUNT, "--count", help="Number of pictures.")],
    seed: Annotated[int, number(SEED, "--seed", help="The same seed gives the same pictures.")] = 0,
    domain: Annotated[str, typer.Option(help="basic | dense | page | mixed")] = "basic",
    as_json: JsonFlag = False,
) -> None:
    """Make a procedural data set."""
    from mmdit_lora.data.shapes import DOMAINS, write_dataset

    if domain not in DOMAINS:
        raise unknown_key(domain, DOMAINS, where="--domain")
    check_new_folder(out, verb="data make")
    write_dataset(out, DOMAINS[domain], count=count, seed=seed, verb="data make")
    say(f"wrote {count} pictures of {kind} ({domain}) to {out}")
    if as_json:
        emit({"out": str(out), "records": count, "kind": kind, "domain": domain, "seed": seed})


def convert(
    src: Annotated[Path, typer.Argument(help="Folder or file to convert.")],
    from_: Annotated[str, typer.Option("--from", metavar="FORMAT", help="Its format; `data formats` lists them.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Format to write; jsonl is what `train` reads.")] = "jsonl",
    caption: Annotated[
        str | None,
        typer.Option(
            help="Template of the captions.  [default: the set's own, else a photo of {phrases}]", show_default=False
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions beside the set: a folder of .txt, a .json, or a .jsonl file.")
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=PHRASE", help="Phrase of a class; may be given many times."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="A split of the source (VOC: a file in ImageSets/Main).")] = None,
    images: Images = None,
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Take the longer of two descriptions of a box, where a set has both.")
    ] = False,
    skip_missing: SkipMissing = False,
    bbox_format: DeclaredFormat = None,
    bbox_units: DeclaredUnits = None,
    holdout: Annotated[
        float | None,
        number(PART, "--holdout", help="Write OUT/train and OUT/validation, the latter with this share."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a data set of another format."""
    from mmdit_lora.data.formats import find_format, read_format, write_format

    find_format(to, option="--to")
    inputs = {"SRC": src, "--images": images, "--captions": captions}
    check_new_folder(out, verb="data convert", inputs=inputs)
    source = read_format(
        from_,
        src,
        split=split,
        images=images,
        caption=caption,
        captions=captions,
        phrases=_phrase_map(map_ or []),
        detailed=detailed,
        bbox_format=bbox_format,
        bbox_units=bbox_units,
        skip_missing=skip_missing,
    )
    parts = {"": source.records} if holdout is None else _held_out(source.records, holdout, src)
    names = _file_names(source.records)
    write_format(to, out, {part: _items(records, names) for part, records in parts.items()})
    counts = {"records": len(source.records)} | {part: len(records) for part, records in parts.items() if part}
    warnings = [*source.warnings, *(f"{n} {what} were left out" for what, n in source.left_out.items())]
    for line in (*(f"warning: {warning}" for warning in warnings), *source.remarks):
        say(line)
    say(f"wrote {', '.join(f'{count} {name}' for name, count in counts.items())} to {out}")
    if as_json:
        boxes = sum(len(record.layout.boxes) for record in source.records)
        told = {"left_out": source.left_out, "warnings": source.warnings}
        emit({"out": str(out), **counts, "boxes": boxes, **told, **source.notes})


def say(message: str) -> None:
    """A line for people, or several, on stderr: stdout is for what was asked for. Each is clipped: it may echo what a file holds."""
    from rich.console import Console

    lines = "\n".join(clip(line, 1000) for line in message.split("\n"))
    with suppress(OSError):  # work is not to end because nobody can be told
        Console(stderr=True, soft_wrap=True).print(lines, markup=False, highlight=False, emoji=False)


def emit(data: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`."""
    text = json_text(data)
    if (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8"):
        text = json.dumps(data)
    sys.stdout.write(text + "\n")


def _phrase_map(pairs: Iterable[str]) -> dict[str, str]:
    phrases: dict[str, str] = {}
    for pair in pairs:
        name, equals, phrase = pair.partition("=")
        if not equals or not name.strip() or not phrase.strip():
            raise InputError(
                f"is {pair!r}", where="--map", cure='write a class and its phrase: --map RBC="a red blood cell"'
            )
        if phrases.setdefault(name.strip(), phrase.strip()) != phrase.strip():
            raise InputError(
                f"gives {shown(name.strip())} two phrases, {shown(phrases[name.strip()])} and {shown(phrase.strip())}",
                where="--map",
                cure="keep one of the two",
            )
    return phrases


def _file_names(records: Iterable[Record]) -> dict[Path, str]:
    """Names for the pictures: their own, or, where two folders hold one name, their paths below what they share."""
    import os

    images = {record.image for record in records}
    if len({image.name for image in images}) == len(images):
        return {image: image.name for image in images}
    shared = os.path.commonpath([image.parent for image in images])
    return {image: image.relative_to(shared).as_posix() for image in images}


def _items(records: Iterable[Record], names: Mapping[Path, str]) -> Iterable[Item]:
    return [(names[record.image], record.image, record.layout) for record in records]


def _held_out(records: list[Record], share: float, src: Path) -> dict[str, list[Record]]:
    """Train and validation by the hash of the file's stem: the same pictures on every machine, in no order of theirs."""
    import hashlib

    stems = sorted(
        {record.image.stem for record in records},
        key=lambda stem: hashlib.blake2b(stem.encode("utf-8", "surrogateescape")).digest(),
    )
    if len(stems) < 2:
        raise InputError(
            "holds a single picture: none is left to hold out", where=str(src), cure="leave --holdout away"
        )
    held = set(stems[: min(max(1, round(share * len(stems))), len(stems) - 1)])
    return {
        "train": [record for record in records if record.image.stem not in held],
        "validation": [record for record in records if record.image.stem in held],
    }
