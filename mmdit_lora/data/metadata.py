"""Where a data set's `metadata.jsonl` lies, and what stands in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdit_lora.errors import InputError, listed
from mmdit_lora.files import require_file
from mmdit_lora.layout import read_json_records

METADATA = "metadata.jsonl"


def find_metadata(folder: Path) -> Path:
    """The `metadata.jsonl` of a data set folder; where it has none, that of the one folder in it that has.

    Raises:
        InputError: no such folder, no such file, or several folders have one.
    """
    if not folder.is_dir():
        raise InputError("no such data set folder", location=str(folder), hint=f"give a folder that holds {METADATA}")
    path = folder / METADATA
    if path.exists():
        return require_file(path, what="metadata file")
    deeper = sorted(found for found in folder.glob(f"*/{METADATA}") if found.is_file() and found.parent.name[0] != ".")
    if len(deeper) == 1 and not any(folder.glob("*.tar")):
        return deeper[0]
    if deeper:
        raise InputError(
            f"has no {METADATA}, and {len(deeper)} of its folders have one",
            location=str(folder),
            hint=f"give one of them: {listed(found.parent for found in deeper)}",
        )
    raise InputError(f"has no {METADATA}", location=str(folder), hint=_hint_without_metadata(folder))


def metadata_records(folder: Path) -> Iterator[tuple[str, Any]]:
    """(place, object or the `InputError` of that line) of a data set folder, one at a time. Raises as `find_metadata`."""
    return read_json_records(find_metadata(folder), what="metadata file")


def _hint_without_metadata(folder: Path) -> str:
    if (folder / "Annotations").is_dir():
        return "it looks like Pascal VOC: `mmdit-lora data convert --from voc`"
    if any(folder.glob("*.tar")):
        return "its tar shards are read by `train` and by `data check|stats|show|cache`; elsewhere give the folder they were made from"
    return f"a data set holds {METADATA}; `mmdit-lora data formats` lists what can be converted"
