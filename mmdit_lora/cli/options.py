"""Options that several verbs share. They are checked as they are read, before anything heavy is imported.

Each number has the range that `mmdit_lora.config.ranges` or the verb states.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmdit_lora.config.ranges import (
    ADAPTER_WEIGHT,
    BATCH,
    COUNT,
    GUIDANCE,
    LAYOUT_SCALE,
    SEED,
    SHARE,
    SIDE,
    STEPS,
    Range,
    check_window,
)
from mmdit_lora.errors import InputError
from mmdit_lora.files import exists, nearest
from mmdit_lora.hub import require_base

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
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave records out whose image is not there.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images, where they lie apart.")]
DataOrShards = Annotated[
    str,
    typer.Argument(
        help="Data set folder; shards (tar, parquet): a folder, pattern or URL, of which a sample is read; or "
        "shapes://DOMAIN?count=N&seed=S."
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


def number(within: Range, name: str, *, help: str, then: Callable[[Any], object] | None = None, **options: Any) -> Any:
    """A `typer.Option` whose value, or each of whose two values, lies in `within`; the help shows the range.

    Args:
        then: checks a value whose numbers are in the range.

    Typer's own `min` and `max` let NaN through, and their refusals say neither the value nor the whole range.
    """

    def checked(value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                within.check(each, name)
        if then is not None and value is not None:
            then(value)
        return value

    checked.within = within  # type: ignore[attr-defined]  # by which tests find it
    return typer.Option(name, help=f"{help} [{str(within).partition('number ')[2]}]", callback=checked, **options)


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "1024" or "1184x880", which is width x height."""
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    if match is None or not all(int(side) in SIDE for side in match.groups(default="1")):
        raise InputError(
            f"is {text!r}",
            location="--size",
            hint=f"give a side in pixels, {SIDE}, or WIDTHxHEIGHT, e.g. 1024 or 1184x880",
        )
    width = int(match[1])
    return int(match[2] or width), width


def folder_and_weight(text: str) -> tuple[str, float]:
    """`FOLDER` or `FOLDER=WEIGHT`.

    Raises:
        InputError: the weight is no number in `ADAPTER_WEIGHT`.
    """
    folder, equals, weight = text.rpartition("=")
    if not equals or exists(text):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise InputError(
            f"{weight!r} is no weight",
            location=f"--adapter {text}",
            hint=f"write FOLDER or FOLDER=WEIGHT, {ADAPTER_WEIGHT}, e.g. FOLDER=0.8",
        ) from None
    return folder, ADAPTER_WEIGHT.check(value, f"the weight in --adapter {text}")


def require_adapter(path: str, location: str = "") -> str:
    """`path`, where an adapter may be. Raises `InputError`: nothing is there."""
    if exists(path):
        return path
    near = nearest(path)
    hint = f"did you mean {near}?" if near else "give an adapter as `mmdit-lora train` or `mmdit-lora export` wrote it"
    raise InputError("no such file or folder", location=f"{location}{path}", hint=hint)


def _require_weighted_adapter(text: str) -> str:
    require_adapter(folder_and_weight(text)[0], "--adapter ")
    return text


def _require_size(text: str) -> str:
    size_of(text)
    return text


def _each(check: Callable[[str], str]) -> Callable[[Any], Any]:
    """The `callback` of an option whose value, or each of whose values, goes through `check`."""

    def checked(value: Any) -> Any:
        if isinstance(value, list):
            return [check(one) for one in value]
        return None if value is None else check(value)

    return checked


adapter_is_there, base_is_there = _each(require_adapter), _each(require_base)  # callbacks of options

BaseOption = Annotated[str, typer.Option("--base", help="Pipeline folder or hub id.", callback=base_is_there)]
OwnBase = Annotated[
    str | None, typer.Option("--base", help="Its base; default: the one that it names.", callback=base_is_there)
]
AdapterArgument = Annotated[str, typer.Argument(help="Adapter folder or file.", callback=adapter_is_there)]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Adapter folder; FOLDER=WEIGHT to weigh it, from -100 to 100; may be given again.",
        callback=_each(_require_weighted_adapter),
    ),
]
StreamOption = Annotated[
    Path | None,
    typer.Option("--stream", help="Folder of a generic layout stream that was trained on the base."),
]
OwnStream = Annotated[
    Path | None,
    typer.Option("--stream", help="Its generic layout stream; default: the one that it names, if any."),
]
StepsOption = Annotated[int | None, number(STEPS, "--steps", help="Sampling steps; default: what the base states.")]
GuidanceOption = Annotated[
    float | None, number(GUIDANCE, "--guidance", help="Classifier-free guidance; default: what the base states.")
]
ScaleOption = Annotated[float, number(LAYOUT_SCALE, "--layout-scale", help="Factor of the layout residual; 0 = off.")]
WindowOption = Annotated[
    tuple[float, float],
    number(
        SHARE,
        "--layout-window",
        help="Part of the steps where the layout acts: START END.",
        then=partial(check_window, location="--layout-window"),
    ),
]
DtypeOption = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--dtype", help="Of the weights that are loaded; bf16 needs half the memory."),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="SIDE|WIDTHxHEIGHT",
        help="In pixels, e.g. 1024 or 1184x880; default: the base's own.",
        callback=_each(_require_size),
    ),
]
BatchOption = Annotated[int, number(BATCH, "--batch-size", help="Images at a time.")]
SeedOption = Annotated[int, number(SEED, "--seed", help="Image i starts from the noise of SEED + i.")]
CountOption = Annotated[int | None, number(COUNT, "--count", help="The first COUNT layouts only.")]
