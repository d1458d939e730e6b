"""Captions from beside a set: a folder of .txt files, a JSON object, or JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mmdit_lora.data.formats.common import need_text, read_text, text
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError
from mmdit_lora.files import json_text
from mmdit_lora.json_files import read_json
from mmdit_lora.layout import read_json_records

# Written by us beside formats that have no place for a caption, and read where it stands.
SIDECAR = "captions.jsonl"


class Captions:
    """Captions by the file name of the image, or by the end of its path.

    `path` is a folder with `<stem>.txt` files, a `.json` object {file name or stem: caption}, or a `.jsonl` file of
    {"file_name": ..., "caption": ...}.

    Raises:
        InputError: the file or folder does not exist, or is none of these; with file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: dict[str, str] = {}
        if path.is_dir():
            return
        if not path.is_file():
            hint = "give captions as .jsonl, .json or a folder of .txt"
            raise InputError("no such file or folder", location=str(path), hint=hint)
        if path.suffix == ".jsonl":
            for location, row in read_json_records(path, what="file of captions"):
                if isinstance(row, InputError):
                    raise row
                self._table[need_text(row, "file_name", location)] = need_text(row, "caption", location)
            return
        data = read_json(path)
        if not isinstance(data, Mapping):
            hint = "give an object {file name: caption}"
            raise InputError(f"holds {type(data).__name__}", location=str(path), hint=hint)
        self._table = {name: text(value, "the caption", f"{path}: {name}") for name, value in data.items()}

    def get(self, image: Path) -> str | None:
        """The caption of an image; None where there is none."""
        if self.path.is_dir():
            file = self.path / f"{image.stem}.txt"
            return (read_text(file).strip() or None) if file.exists() else None
        ends = ["/".join(image.parts[-length:]) for length in range(min(4, len(image.parts)), 0, -1)]
        return next((self._table[key] for key in [*ends, image.stem] if key in self._table), None)


def write_sidecar(folder: Path, items: Iterable[Item]) -> None:
    """Write the captions of items, with the names under which their images are written."""
    lines = [json_text({"file_name": name, "caption": layout.caption}) for name, _, layout in items]
    (folder / SIDECAR).write_text("\n".join(lines) + "\n", encoding="utf-8")
