"""Adapters for other tools: writing, reading back, comparing. What is known before torch is imported is here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from mmdit_lora.errors import InputError
from mmdit_lora.outputs import Inputs, check_new_folder

Target = Literal["peft", "diffusers", "kohya", "creatilayout", "merged"]
TARGETS: tuple[Target, ...] = get_args(Target)


def check_target(to: Target, out: str | Path, *, merge: bool, inputs: Inputs) -> None:
    """Before any work: whether an export of this kind may be written to `out`.

    Raises:
        InputError: it may not, see `outputs.check_new_folder`; or `merge` is given with another format than creatilayout.
    """
    if merge and to != "creatilayout":
        raise InputError("is for --to creatilayout", location="--merge", hint="--to merged writes a whole base")
    if to != "kohya":
        check_new_folder(out, verb="export", inputs=inputs)
    elif Path(out).suffix != ".safetensors":
        raise InputError("is one file", location=f"--out {out}", hint="give a name that ends in .safetensors")
