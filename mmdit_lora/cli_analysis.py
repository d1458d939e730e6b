"""The verbs that look into adapters: `inspect`, `resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdit_lora.cli_data import JsonFlag, emit, refuse_file_as_folder, say
from mmdit_lora.cli_model import DtypeOption, _refuse_foreign

OwnBase = Annotated[str | None, typer.Option("--base", help="Its base; default: the one that it names.")]


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    app.command("inspect")(inspect)


def inspect(
    adapter: Annotated[str, typer.Argument(help="Adapter folder.")],
    base: OwnBase = None,
    against: Annotated[
        str | None, typer.Option("--against", help="A second adapter on the same base, whose directions are compared.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for inspect.json and inspect.html.")] = None,
    dtype: DtypeOption = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """What an adapter changes: norms, spectrum, ranks that hold it, and what it amplifies, linear by linear."""
    if out is not None:
        refuse_file_as_folder(out)
        _refuse_foreign(out, "inspect.json")
    import torch

    from mmdit_lora.analysis.inspect_page import lines, page
    from mmdit_lora.analysis.inspection import inspect_adapter
    from mmdit_lora.files import write_json, write_text

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = inspect_adapter(adapter, base=base, against=against, dtype=dtypes[dtype])
    for line in lines(found):
        say(line)
    if out is not None:
        write_text(out / "inspect.html", page(found))
        write_json(out / "inspect.json", found.to_dict())
        say(f"wrote {out / 'inspect.html'} and inspect.json")
    if as_json:
        emit(found.to_dict())
