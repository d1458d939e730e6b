"""Configs of earlier versions: what has another name or place since then is moved there before anything else reads it.

A file says `version: N`; one that says nothing is of version 1, the first. A change that an old file would not survive gets
a step here, from N to N + 1, and `VERSION` goes up. New keys with defaults need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdit_lora.errors import InputError, shown

VERSION = 1

# version -> what makes the next one of it: changes the mapping in place and returns a line on each thing that it moved.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], list[str]]] = {}


def migrate(data: dict[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """A config as this version has it, and what was changed for that, in lines for people.

    Args:
        data: as the file has it; not changed.
        where: the file, for messages.

    Raises:
        InputError: the version is none, or a later one than this.
    """
    version = data.get("version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"version is {shown(version)}", where=where, cure=f"leave it out, or give 1 to {VERSION}")
    if version > VERSION:
        raise InputError(
            f"is of version {version}, and this mmdit-lora knows configs up to {VERSION}",
            where=where,
            cure="install a newer mmdit-lora, or write a new config with `mmdit-lora init`",
        )
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    lines = [line for step in range(version, VERSION) for line in MIGRATIONS[step](data)]
    return {**data, "version": VERSION}, lines
