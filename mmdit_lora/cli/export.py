"""The verbs between this program and others: `export`, `verify`, `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import mmdit_lora
from mmdit_lora.cli.options import AdapterArgument, JsonFlag, OwnBase, OwnStream, adapter_is_there
from mmdit_lora.cli.output import emit, say
from mmdit_lora.errors import InputError
from mmdit_lora.export import Target, check_target
from mmdit_lora.files import exists, nearest, written_as_path
from mmdit_lora.outputs import check_new_folder

imports = typer.Typer(help="Bring in the weights of other projects.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    app.command("export")(export)
    app.command("verify")(verify)
    app.add_typer(imports, name="import")


def export(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Adapter folder or file; with --to creatilayout also a base, for its stream.",
            callback=adapter_is_there,
        ),
    ],
    to: Annotated[
        Target,
        typer.Option(
            help="peft: a PEFT folder. diffusers: for pipe.load_lora_weights. kohya: one file in sd-scripts' names, which no other tool reads. "
            "creatilayout: under CreatiLayout's names. merged: a whole base."
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="Folder to write; for kohya a .safetensors file.")],
    base: OwnBase = None,
    stream: OwnStream = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="creatilayout: the whole stream, with the adapter in its weights.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter for other tools, read it back in a fresh process, and compare."""
    check_target(to, out, merge=merge, inputs={"ADAPTER": adapter, "--base": base, "--stream": stream})
    report = mmdit_lora.export_adapter(adapter, to=to, out=out, base=base, stream=stream, merge=merge)
    say(f"wrote {report.out} ({report.bytes / 2**20:.2f} MiB); read back, it differs by {report.max_abs_diff:.1e}")
    if report.max_image_diff is not None:
        say(f"an image sampled with it, twice with one seed, differs by {report.max_image_diff:.1e} of 1")
    if report.note:
        say(f"note: {report.note}")
    if as_json:
        emit(report.to_dict())


def verify(
    adapter: AdapterArgument,
    base: OwnBase = None,
    stream: OwnStream = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that an adapter is whole, fits its base, does something, and that PEFT alone loads it to the same outputs."""
    from mmdit_lora.export.export import verify_adapter

    report = verify_adapter(adapter, base=base, stream=stream)
    say("\n".join(f"{key:<13} {value}" for key, value in report.items()))
    if as_json:
        emit(report)


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
