"""The verb `data cache`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdit_lora.errors import InputError
from mmdit_lora.outputs import refuse_inputs

DEFAULT_FOLDER = "outputs/cache"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def register(data: typer.Typer) -> None:
    """Add this file's verb to the app of `data`."""
    data.command("cache")(cache)


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
        bool, typer.Option("--verify", help="First read the whole folder; what is damaged goes out and is made anew.")
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
    """Encode pictures, captions and phrases in advance. It goes on where it was stopped; several may fill one folder."""
    from mmdit_lora.config import Config, load_config

    most = None if prune is None else parse_bytes(prune, where="--prune")
    if source.is_dir():
        if overrides:
            raise InputError(
                f"{overrides[0]!r} is for a config file, and {source} is a data set",
                where="overrides",
                cure="write a config with `mmdit-lora init DATA --out FILE`",
            )
        config = Config.model_validate({"base": base, "data": {"path": str(source)}})
    else:
        config = load_config(source, overrides or ())
    folder = Path(out if out is not None else config.data.cache or DEFAULT_FOLDER)
    inputs = {"base": config.base, "data.path": config.data.path, "data.validation": config.data.validation}
    refuse_inputs([folder], inputs, verb="data cache", inside=False)
    from mmdit_lora.cli_data import emit, say
    from mmdit_lora.cli_progress import ProgressLines
    from mmdit_lora.data.cache import DiskCache
    from mmdit_lora.training.fill_cache import fill_cache

    store = DiskCache(folder)
    report: dict[str, Any] = {"folder": str(folder)}
    if verify:
        count, damaged = store.verify()
        for path in damaged:
            say(f"damaged, taken out: {path}")
        say(f"{count} entries read, {len(damaged)} damaged")
        report["verified"] = {"entries": count, "damaged": [str(path) for path in damaged]}
    with ProgressLines() as tell:
        report |= fill_cache(config, store, tell=tell)
    if report["uncached_pictures"]:
        say(
            "pictures are not cached: their crops or flips are new each time (data.cache_variants: 4 draws one of 4 a picture)"
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


def parse_bytes(text: str, *, where: str) -> int:
    """A size such as 500MB, 20GB or 1.5TiB. Raises `InputError` with the option `where`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    size = math.inf if match is None or unit is None else float(match[1]) * unit
    if not size <= 2**60:
        raise InputError(f"is {text!r}", where=where, cure="give a size such as 500MB, 20GB or 1.5TiB")
    return int(size)
