"""`data formats`: what `data convert` and `data check` read and write."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(data: typer.Typer) -> None:
    """Add this file's verb to the `data` verbs."""
    data.command("formats")(formats)


def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the formats of data sets that are read and written."""
    from mmdit_lora.data.formats import FORMATS, format_table

    if as_json:
        print(
            json.dumps(
                {
                    name: {"source": kind.source, "convention": kind.convention, "written": kind.write is not None}
                    for name, kind in FORMATS.items()
                }
            )
        )
    else:
        print(format_table())
