"""The verb `import`: other projects' weights as a base of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mmdit_lora.cli.options import JsonFlag
from mmdit_lora.cli.output import emit, say
from mmdit_lora.errors import InputError
from mmdit_lora.files import exists, nearest, written_as_path
from mmdit_lora.outputs import check_new_folder

imports = typer.Typer(help="Bring in the weights of other projects.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    app.add_typer(imports, name="import")


@imports.callback()
def _group() -> None:
    """Keeps the project's name a word of the command, although there is only one yet."""


@imports.command("creatilayout")
def creatilayout(
    base: Annotated[
        str, typer.Option("--base", help="Folder or hub id of the base; a folder with only transformer/ will do.")
    ],
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            help="A SiamLayout_* safetensors file, a folder of one or of shards, or one on the hub: OWNER/NAME/PATH.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Of what is written; default: as stored.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """CreatiLayout's layout stream (SD3, SD3-LoRA or FLUX) on its base, as a base of ours."""
    for option, given in (("--base", base), ("--weights", weights)):
        if not exists(given) and written_as_path(given) and given.startswith((".", "/", "~")):
            near = nearest(given)
            hint = f"did you mean {near}?" if near else "give a path that is there, or OWNER/NAME of the hub"
            raise InputError("no such file or folder", location=f"{option} {given}", hint=hint)
    check_new_folder(out, verb="import", inputs={"--base": base, "--weights": weights})
    import torch

    from mmdit_lora.models.import_creatilayout import import_creatilayout

    report = import_creatilayout(base, weights, out, dtype=None if dtype is None else getattr(torch, dtype))
    say(
        f"wrote {report.out}: the {report.variant} stream, {report.stream_tensors} tensors, "
        f"{report.stream_params / 1e6:.2f} M parameters, {report.dtype}; the base's tensors are from --"
        f"{report.base_tensors_from}"
    )
    if as_json:
        emit(report.to_dict())
