"""Hub ids where files are meant: what the cache of huggingface_hub or the hub has of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmdit_lora.errors import InputError, clip

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_copy(source: str | Path, *, where: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """`source` itself where it is there; else a hub id's files, downloaded or from the cache of huggingface_hub.

    Args:
        source: a path, a hub id OWNER/NAME, or a folder or file in it: OWNER/NAME/PATH.
        allow, ignore: patterns of the files that are needed, relative to OWNER/NAME or PATH.

    Returns:
        The path, or the folder of that snapshot in the cache, or PATH in it.

    Raises:
        InputError: it is neither here nor to be had, e.g. as there is no connection, or it asks for a login.
    """
    text, path = str(source), Path(source)
    if _exists(path):
        return path
    owner, _, rest = text.partition("/")
    name, _, inside = rest.partition("/")
    repository = f"{owner}/{name}"
    if not _REPOSITORY.fullmatch(repository) or ".." in inside.split("/"):
        raise InputError(
            "no such file or folder", where=f"{where} {clip(text)}", cure="give a path, or a hub id: OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    head = f"{inside}/" if inside else ""
    wanted = [*([inside] if inside else []), *(head + pattern for pattern in allow)]
    unwanted = [head + pattern for pattern in ignore]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's client and its HTTP library raise types of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        cure = f"`hf download {repository}` where there is a connection; `hf auth login` where it asks for a licence"
        raise InputError(
            f"is not here, and as a hub id it is neither in the cache nor to be had ({clip(first)})",
            where=f"{where} {clip(text)}",
            cure=cure,
        ) from None
    if not (folder / inside).exists():
        held = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        raise InputError(
            f"{repository} holds no {inside}",
            where=where,
            cure=f"it holds {', '.join(held[:8])}" if held else f"`hf download {repository} {inside}` first",
        )
    return folder / inside


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False
