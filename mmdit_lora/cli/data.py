"""The verbs that work with data sets: `init` and `data make|synthesize|check|convert|cache|split|shard|stats|show|formats`."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from mmdit_lora.cli.options import (
    BoxFormat,
    BoxUnits,
    DataOrShards,
    DeclaredFormat,
    DeclaredUnits,
    FilterOption,
    Images,
    JsonFlag,
    SkipMissing,
    number,
)
from mmdit_lora.cli.output import ProgressLines, emit, say
from mmdit_lora.cli.synthesize import synthesize
from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.config.ranges import COUNT, PART, SEED, Range
from mmdit_lora.data.buckets import one_size
from mmdit_lora.data.check import CheckReport, check_dataset, clip_tokens, read_written
from mmdit_lora.data.filters import filter_records, parse_filter
from mmdit_lora.data.formats import FORMATS, Source, find_format, format_table, read_format, write_format
from mmdit_lora.data.init_config import commented_config
from mmdit_lora.data.records import Item, Record, Warnings, read_dataset, scan_dataset, write_splits
from mmdit_lora.data.shapes import DOMAINS, is_scenes, write_dataset
from mmdit_lora.data.shards import is_sharded
from mmdit_lora.data.shards.tar import write_shards
from mmdit_lora.data.sources import sample_dataset
from mmdit_lora.data.split import split_records
from mmdit_lora.data.stats import Stats, dataset_stats
from mmdit_lora.errors import InputError, several, shown, unknown_key
from mmdit_lora.files import write_json, write_text
from mmdit_lora.outputs import check_new_file, check_new_folder, new_folder, refuse_inputs
from mmdit_lora.visual import contact_sheet, is_marked_png, save_png
from mmdit_lora.visual.compose import fit

SAMPLE = 10_000  # records of shards that are read
DEFAULT_FOLDER = "outputs/cache"
_LARGEST = 2**40  # bytes of a shard; places in an index reach twice as far
_PHRASES_SHOWN = 12
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    data = typer.Typer(help="Make, check, convert, split, shard and show data sets.", no_args_is_help=False)
    app.command("init")(init)
    for verb in (make, convert, formats, check, split, stats, show, shard, cache, synthesize):
        data.command(verb.__name__)(verb)
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
    count: Annotated[int, number(COUNT, "--count", help="Number of images.")],
    seed: Annotated[int, number(SEED, "--seed", help="The same seed gives the same images.")] = 0,
    domain: Annotated[str, typer.Option(help=" | ".join(DOMAINS))] = "basic",
    as_json: JsonFlag = False,
) -> None:
    """Make a procedural data set."""
    if domain not in DOMAINS:
        raise unknown_key(domain, DOMAINS, location="--domain")
    check_new_folder(out, verb="data make")
    write_dataset(out, DOMAINS[domain], count=count, seed=seed, verb="data make")
    say(f"wrote {count} images of {kind} ({domain}) to {out}")
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
    parts: dict[str, Sequence[Record]] = {"": source.records}
    if holdout is not None:
        sides = split_records(source.records, holdout, location=str(src))
        parts = dict(zip(("train", "validation"), sides, strict=True))
    names = _file_names(source.records)
    write_format(to, out, {part: _items(records, names) for part, records in parts.items()})
    counts = {"records": len(source.records)} | {part: len(records) for part, records in parts.items() if part}
    warnings = [*source.warnings, *(f"{n} {what} were left out" for what, n in source.left_out.items())]
    for line in (*(f"warning: {warning}" for warning in warnings), *source.remarks):
        say(line)
    say(f"wrote {', '.join(f'{count} {name}' for name, count in counts.items())} to {out}")
    if as_json:
        boxes = sum(len(record.layout.boxes) for record in source.records)
        lists = {"left_out": source.left_out, "warnings": source.warnings}
        emit({"out": str(out), **counts, "boxes": boxes, **lists, **source.notes})


def _phrase_map(pairs: Iterable[str]) -> dict[str, str]:
    phrases: dict[str, str] = {}
    for pair in pairs:
        name, _, phrase = (part.strip() for part in pair.partition("="))
        if not name or not phrase:
            hint = 'write a class and its phrase: --map RBC="a red blood cell"'
            raise InputError(f"is {pair!r}", location="--map", hint=hint)
        if phrases.setdefault(name, phrase) != phrase:
            what = f"gives {shown(name)} two phrases, {shown(phrases[name])} and {shown(phrase)}"
            raise InputError(what, location="--map", hint="keep one of the two")
    return phrases


def _file_names(records: Iterable[Record]) -> dict[Path, str]:
    """Names for the images: their own, or, where two folders hold one name, their paths below what they share."""
    images = {record.image for record in records}
    if len({image.name for image in images}) == len(images):
        return {image: image.name for image in images}
    shared = os.path.commonpath([image.parent for image in images])
    return {image: image.relative_to(shared).as_posix() for image in images}


def _items(records: Iterable[Record], names: Mapping[Path, str]) -> list[Item]:
    return [(names[record.image], record.image, record.layout) for record in records]


def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the formats of data sets that are read and written."""
    if as_json:
        facts = {
            n: {"source": f.source, "convention": f.convention, "written": f.write is not None}
            for n, f in FORMATS.items()
        }
        print(json.dumps(facts))
    else:
        print(format_table())


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
    most = parse_bytes(size, location="--size")
    if not 0 < most <= _LARGEST:
        raise InputError(f"is {size}", location="--size", hint="give from 1 to 1TiB, e.g. 500MB")
    check_new_folder(out, verb="data shard", inputs={"DATA": data})
    rules = parse_filter(filter_ or [])
    records = read_dataset(data, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, location="--filter")
    written = write_shards(out, filtered.records, size=most)
    if filtered.summary:
        say(f"warning: {filtered.summary}")
    shards = "1 shard" if written.shards == 1 else f"{written.shards} shards"
    say(f"wrote {written.records} records in {shards} to {out}")
    if as_json:
        emit({"out": str(out), "records": written.records, "shards": written.shards, "filter": filtered.to_dict()})


def show(
    data: DataOrShards,
    out: Annotated[str, typer.Option(metavar="PATH", help="The .png to write.")],
    count: Annotated[
        int, number(Range(1, 400, whole=True), "--count", help="Layouts to show, taken evenly from the whole set.")
    ] = 16,
    cell: Annotated[
        int, number(Range(64, 1024, whole=True), "--cell", help="Longer side of each image in pixels.")
    ] = 256,
    filter_: FilterOption = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Draw a contact sheet: images with their boxes, phrases and captions."""
    if Path(out).suffix.lower() != ".png":
        raise InputError("is no .png", location=f"--out {out}", hint="give a file name that ends in .png")
    check_new_file(out, verb="data show", inputs={"DATA": data}, is_own=is_marked_png)
    rules = parse_filter(filter_ or [])
    most = SAMPLE if filter_ else count
    records, whole = sample_dataset(data, most, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, location="--filter")
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


def split(
    data: Annotated[Path, typer.Argument(help="Data set folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write: OUT/train and OUT/validation.")],
    share: Annotated[float, number(PART, "--share", help="Share of the images that is for validation.")] = 0.1,
    by: Annotated[
        Literal["name", "image"],
        typer.Option(help="name: by the hash of the file name; image: of the pixels, so that copies stay together."),
    ] = "name",
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Split a data set in two, the same way each time; all layouts of an image go to one side."""
    check_new_folder(out, verb="data split", inputs={"DATA": data})
    records = read_dataset(data, bbox_format=bbox_format, bbox_units=bbox_units)
    train, validation = split_records(records, share, by=by, location=str(data))
    names = {record.image: record.image.relative_to(data).as_posix() for record in records}
    parts = {"train": _items(train, names), "validation": _items(validation, names)}
    write_splits(out, parts, verb="data split")
    extra = Counter(column for record in records for column in record.extra)
    if extra:
        say(f"warning: columns that mean nothing here were not written: {', '.join(sorted(extra))}")
    counts = {"records": len(records), "train": len(train), "validation": len(validation)}
    say(f"wrote {len(train)} layouts to {out / 'train'}, {len(validation)} to {out / 'validation'}")
    if as_json:
        emit({"out": str(out), "by": by, **counts})


def stats(
    data: DataOrShards,
    filter_: FilterOption = None,
    bbox_format: BoxFormat = "xyxy",
    bbox_units: BoxUnits = "relative",
    as_json: JsonFlag = False,
) -> None:
    """Say how large images and boxes are, how many, and what the phrases are; with a filter, of what it leaves."""
    rules = parse_filter(filter_ or [])
    records, total = sample_dataset(data, SAMPLE, bbox_format=bbox_format, bbox_units=bbox_units)
    filtered = filter_records(records, rules, location="--filter")
    found = dataset_stats(filtered.records)
    if len(records) < total:
        say(f"of {total} records {len(records)} were read, evenly spread")
    for line in _lines(found):
        say(line)
    if filtered.summary:
        say(f"warning: {filtered.summary}")
    if as_json:
        emit({**found.to_dict(), "records": total, "looked_at": len(records), "filter": filtered.to_dict()})


def _lines(found: Stats) -> Iterator[str]:
    counts = f"{found.images} images, {found.layouts} layouts, {found.boxes} boxes"
    yield f"{counts}, {found.distinct_phrases} distinct phrases"
    yield f"boxes a layout: {', '.join(f'{boxes} ({count}x)' for boxes, count in found.boxes_per_layout.items())}"
    spreads = {
        "width, pixels": found.width,
        "height, pixels": found.height,
        "width / height": found.aspect,
        "box's share of image": found.box_area,
        "box's width / height": found.box_aspect,
        "words a caption": found.caption_words,
    }
    yield f"{'':24}" + "".join(f"{name:>9}" for name in ("min", "q05", "q25", "median", "q75", "q95", "max"))
    for name, spread in spreads.items():
        if spread is not None:
            yield f"{name:24}" + "".join(f"{value:>9.4g}" for value in spread.values())
    for phrase, count in list(found.phrases.items())[:_PHRASES_SHOWN]:
        yield f"{count:>7}x {phrase}"
    if found.distinct_phrases > _PHRASES_SHOWN:
        yield f"         and {found.distinct_phrases - _PHRASES_SHOWN} other phrases"


def cache(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG_OR_DATA", help="YAML file of a run, or a data set folder.", exists=False)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.cache_variants=4")] = None,
    base: Annotated[
        str, typer.Option("--base", help="Pipeline folder or hub id, where a data set folder is given.")
    ] = "data/tiny_base",
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"Folder of the cache.  [default: data.cache, or {DEFAULT_FOLDER}]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First read the whole folder; what is damaged is removed and made again.")
    ] = False,
    prune: Annotated[
        str | None,
        typer.Option(
            "--prune", metavar="SIZE", help="At the end keep so much, e.g. 20GB; least recently used go first."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Encode images, captions and phrases in advance. It goes on where it was stopped; several may fill one folder."""
    most = None if prune is None else parse_bytes(prune, location="--prune")
    if source.is_dir():
        if overrides:
            raise InputError(
                f"{overrides[0]!r} is for a config file, and {source} is a data set",
                location="overrides",
                hint="write a config with `mmdit-lora init DATA --out FILE`",
            )
        config = Config.model_validate({"base": base, "data": {"path": str(source)}})
    else:
        config = load_config(source, overrides or ())
    folder = Path(out if out is not None else config.data.cache or DEFAULT_FOLDER)
    inputs = {"base": config.base, "data.path": config.data.path, "data.validation": config.data.validation}
    refuse_inputs([folder], inputs, verb="data cache", inside=False)
    from mmdit_lora.data.cache import EncodingCache
    from mmdit_lora.training.fill_cache import fill_cache

    store = EncodingCache(folder)
    report: dict[str, Any] = {"folder": str(folder)}
    if verify:
        count, damaged = store.verify()
        for path in damaged:
            say(f"damaged, taken out: {path}")
        say(f"{count} entries read, {len(damaged)} damaged")
        report["verified"] = {"entries": count, "damaged": [str(path) for path in damaged]}
    with ProgressLines() as progress:
        report |= fill_cache(config, store, on_progress=progress)
    if report["uncached_images"]:
        say(
            "images are not cached: their crops or flips are new each time (data.cache_variants: 4 draws one of 4 an image)"
        )
    if most is not None:
        count, freed = store.prune(most)
        say(f"pruned {count} entries, {freed:,} bytes")
        report["pruned"] = {"entries": count, "bytes": freed}
    stats, size = store.stats.to_dict(), store.size()
    hits, misses = sum(stats["hits"].values()), sum(stats["misses"].values())
    total = sum(of_kind["bytes"] for of_kind in size.values())
    say(f"{misses} entries made, {hits} found; {folder} holds {total:,} bytes")
    if config.data.cache is None:
        say(f"`train` reads it with data.cache={folder}")
    if as_json:
        emit(report | {"stats": stats, "size": size, "bytes": total})


def parse_bytes(text: str, *, location: str) -> int:
    """A size such as 500MB, 20GB or 1.5TiB. Raises `InputError` with the option `where`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = math.inf if match is None or unit is None else float(match[1]) * unit
    if not size <= 2**60:
        raise InputError(f"is {text!r}", location=location, hint="give a size such as 500MB, 20GB or 1.5TiB")
    return int(size)


def check(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA_OR_CONFIG",
            help="Data set folder, shards (tar, parquet: a folder, pattern or URL), shapes://DOMAIN?count=N&seed=S, or the "
            "YAML file of a run.",
        ),
    ],
    from_: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Check a set of another format (`data formats`).")
    ] = None,
    split: Annotated[str | None, typer.Option(help="A split of the source.")] = None,
    images: Images = None,
    skip_missing: SkipMissing = False,
    out: Annotated[Path | None, typer.Option(help="Write check.json and check.html (with images) here.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another data set (the validation set) that must not hold the same images.")
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
            help="Side of the training images in pixels: smaller images are listed.",
        ),
    ] = None,
    bbox_format: DeclaredFormat = None,
    bbox_units: DeclaredUnits = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a data set, decode its images, and say what is in it and what is wrong with it.

    With a run's config, it is checked as that run would use it: its buckets, its crop, its batch, its validation set.
    """
    inputs: dict[str, str | Path | None] = {"DATA": data, "--images": images, "--against": against, "--base": base}
    if out is not None:
        check_new_folder(out, verb="data check", inputs=inputs)
    if against is None and against_from is not None:
        raise InputError("belongs to --against", location="--against-from", hint="leave it away, or give --against")
    usage: dict[str, Any] = {"buckets": None if resolution is None else one_size((resolution, resolution))}
    if data.endswith((".yaml", ".yml")):
        given = {"--from": from_, "--against": against, "--base": base, "--resolution": resolution}
        for option, value in (given | {"--bbox-format": bbox_format, "--bbox-units": bbox_units}).items():
            if value is not None:
                raise InputError("is said by the config", location=option, hint="leave it away")
        data, against, base, usage, (own_format, own_units) = _of_run(data)
    else:
        own_format, own_units = bbox_format, bbox_units
    tokens = clip_tokens(base)
    found = _read(data, from_, own_format, own_units, split=split, images=images, skip_missing=skip_missing)
    other_format = against_from or from_
    # The conventions that were declared are of DATA; those of a set in another format are its own.
    declared = (own_format, own_units) if other_format == from_ else (None, None)
    others = _read(against, other_format, *declared, skip_missing=skip_missing).records if against else []
    report = check_dataset(found.records, against=others, tokens=tokens, **usage, **found.given)
    report.notes.extend(found.notes)
    _print(report)
    if out is not None:
        refuse_inputs([out], {"DATA": data, "--against": against}, verb="data check")  # of the config
        _write(report, found.records, data, out)
    if as_json:
        emit(report.to_dict())
    _raise_errors(report, data)


class _Input(NamedTuple):
    """Records, what `check_dataset` is given of how they were read, and lines for people."""

    records: Sequence[Record]
    given: dict[str, Any]
    notes: Sequence[str] = ()
    source: Source | None = None  # holds images that lay inside other files, as long as this lives


def _read(
    data: str,
    from_: str | None,
    bbox_format: str | None,
    bbox_units: str | None,
    *,
    split: str | None = None,
    images: Path | None = None,
    skip_missing: bool = False,
) -> _Input:

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
        given = {"errors": source.errors, "left_out": dict(source.left_out), "warnings": source.warnings}
        return _Input(source.records, given, source.remarks, source)
    for option, value in (("--images", images), ("--split", split)):
        if value is not None:
            raise InputError("belongs to --from FORMAT", location=option, hint="leave it away")
    conventions = {"bbox_format": bbox_format or "xyxy", "bbox_units": bbox_units or "relative"}
    # Opening shards reads every layout and header, unless an index says that it was done.
    if is_scenes(data) or is_sharded(data):
        lines: list[str] = []
        records, total = sample_dataset(data, SAMPLE, **conventions, on_warning=lines.append)
        note = f"{len(records)} of {total} records, evenly spread, are what the rest is about"
        return _Input(records, {"warnings": lines}, [] if is_scenes(data) else [note])
    warnings = Warnings()
    records, errors = scan_dataset(data, **conventions, warnings=warnings)
    written = read_written(data, **conventions)
    return _Input(records, {"errors": errors, "written": written, "warnings": warnings.lines()})


def _of_run(path: str) -> tuple[str, str | None, str, dict[str, Any], tuple[str | None, str | None]]:
    """Data, validation set, base, how the images are used, and the conventions, as a run's config has them."""
    import torch

    from mmdit_lora.training.load_base import open_encoders
    from mmdit_lora.training.setup import run_buckets

    config = load_config(path)
    section = config.data
    usage = {
        "buckets": run_buckets(config, open_encoders(config, torch.float32, texts=False)),
        "batch": config.train.batch_size * config.train.gradient_accumulation,
        "min_visible": section.min_visible,
    }
    return section.path, section.validation, config.base, usage, (section.bbox_format, section.bbox_units)


def _print(report: CheckReport) -> None:
    if report.records:
        sizes = [f"{count} of {size}" for size, count in report.image_sizes.items()]
        more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
        say(
            f"{report.images} images, {report.records} layouts, {report.boxes} boxes, {report.phrases} distinct phrases"
        )
        say(f"sizes: {', '.join(sizes[:5])}{more}")
        say(f"boxes an image: {', '.join(f'{boxes} ({n}x)' for boxes, n in report.boxes_per_image.items())}")
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
        first = found.examples[0].location.rpartition("/")[2] if found.examples else ""
        severity = Text(found.severity, style="red" if found.severity == "error" else "yellow")
        table.add_row(severity, found.name, str(found.count), f"{found.total} {found.unit}", Text(first))
    Console(stderr=True).print(table)


def _write(report: CheckReport, records: Iterable[Record], data: str, out: Path) -> None:
    from mmdit_lora.data.check.page import page

    boxes = [box for record in records for box in record.layout.boxes]
    with new_folder(out, verb="data check") as folder:
        write_text(folder / "check.html", page(report, title=data, boxes=boxes))
        write_json(folder / "check.json", {"data": data, **report.to_dict()})
    say(f"wrote {out / 'check.html'} and {out / 'check.json'}")


def _raise_errors(report: CheckReport, data: str) -> None:
    if len(report.errors) == 1:
        raise InputError("\n".join(filter(None, (report.errors[0], report.hint))))
    if report.errors:
        first = [InputError(message.splitlines()[0]) for message in report.errors]
        raise several(first, location=data, hint=report.hint)
