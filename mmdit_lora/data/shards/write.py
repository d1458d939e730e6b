"""Tar shards and their indices from records; the same records give the same bytes."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.records import Record, layout_columns
from mmdit_lora.data.shards.index import SUFFIX, row_type, save_index
from mmdit_lora.data.shards.store import find
from mmdit_lora.data.shards.tar import IMAGES, add_member, digest, split_key
from mmdit_lora.errors import InputError
from mmdit_lora.files import json_text
from mmdit_lora.layout import Layout
from mmdit_lora.outputs import new_folder

CONVENTIONS = "xyxy relative"  # what is written, and what readers take where nothing is declared
_SHARD = re.compile(rf"shard-\d{{6}}\.tar({re.escape(SUFFIX)})?")


class ShardWriter:
    """Writes `shard-000000.tar`, ... and an index of each into a folder, which it must have for itself.

    Args:
        size: bytes after which a shard is full; one record may be larger.
    """

    def __init__(self, folder: Path, *, size: int) -> None:
        self.folder, self.size = folder, size
        self.records = self.shards = 0
        self._tar: tarfile.TarFile | None = None
        self._rows: list[tuple[Any, ...]] = []

    def add(self, image: bytes, ending: str, layout: Layout, *, file_name: str | None = None) -> None:
        """Append a record; its key is its number.

        Args:
            image: the content of a file of `IMAGES`, `ending` without dot. file_name: kept in the json, for people.

        Raises:
            InputError: `image` is none, without place.
        """
        width, height = image_size(image)
        named = {} if file_name is None else {"file_name": file_name}
        text = json_text({**named, **layout_columns(layout)}).encode()
        if self._tar is not None and self._tar.offset + len(image) + len(text) + 4096 > self.size:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in _finish
        key = f"{self.records:09d}"
        first = add_member(self._tar, f"{key}.{ending}", image)
        second = add_member(self._tar, f"{key}.json", text)
        self._rows.append(
            (
                *(first, len(image), second, len(text), 0, 0),
                *(width, height, len(layout.boxes)),
                *(digest(image), digest(text, b""), split_key(file_name, image)),
                f"{key}.{ending}".encode(),
            )
        )
        self._tar.members = []  # type: ignore[attr-defined]  # tarfile keeps what it has written
        self.records += 1

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish()

    def _path(self) -> Path:
        return self.folder / f"shard-{self.shards:06d}.tar"

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        rows = np.array(self._rows, dtype=row_type(max(len(row[-1]) for row in self._rows)))
        save_index(find(str(self._path())), rows, CONVENTIONS)
        self._tar, self._rows = None, []
        self.shards += 1


def write_shards(out: str | Path, records: Iterable[Record], *, size: int) -> ShardWriter:
    """Write records as tar shards with indices into the folder `out`: all of them, or nothing.

    An image's file is taken as it is (of an ending that is not one of `IMAGES`: as PNG), and decoded once, so that no
    damaged one is passed on.

    Returns:
        The closed writer, for its counts.

    Raises:
        InputError: `out` holds something else than earlier shards, or an image cannot be read.
    """
    with new_folder(out, verb="data shard") as folder:
        writer = ShardWriter(folder, size=size)
        for record in records:
            writer.add(*_image(record), record.layout, file_name=record.name)
        if not writer.records:
            raise InputError("there is no image to write", hint="a data set holds at least one image")
        writer.close()
    return writer


def _image(record: Record) -> tuple[bytes, str]:
    content, ending = record.read_bytes(), record.image.suffix.lower().lstrip(".")
    try:
        image = load_image(content)
    except InputError as error:
        raise error.at(record.location) from None
    if ending in IMAGES:
        return content, ending
    target = BytesIO()
    image.save(target, format="PNG")
    return target.getvalue(), "png"
