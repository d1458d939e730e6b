"""Options that several verbs share; those that are numbers each with the range that `mmdit_lora.config.ranges` or the verb states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmdit_lora.config.ranges import Range

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
