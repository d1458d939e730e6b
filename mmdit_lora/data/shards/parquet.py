"""Parquet shards as Hugging Face `datasets` writes them: image, caption, objects.

A shard's footer alone is read when it is opened. A row group is what is read at once; each process keeps a few. So a wrong row
is found when its turn comes, not before; and with N workers each group is read at most N times an epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_lora.boxes import EdgeCount
from mmdit_lora.data.formats.hugging_face import class_names, line_of
from mmdit_lora.data.formats.tables import import_or_explain
from mmdit_lora.data.images import image_size
from mmdit_lora.data.records import parse_layout
from mmdit_lora.data.shards.records import Part, ShardRecord
from mmdit_lora.data.shards.store import Stored
from mmdit_lora.data.shards.tar import digest
from mmdit_lora.data.split import name_key
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Clipped

_COLUMNS = ("image", "caption", "text", "prompt", "objects", "bbox_format", "bbox_units")
_BLOCK = 2**20  # bytes that are read ahead in a remote file
KEPT = 20  # row groups; more than the order's window, so that a process reads each once an epoch


class ParquetPart(Part):
    """A parquet shard that is open.

    Args:
        groups: the row groups read last, of all shards of a set together; at most `KEPT`.
        edges: counts the boxes that are clipped in the rows that are read.

    Raises:
        InputError: the file is no parquet file, holds no row, or lacks a column.
    """

    def __init__(
        self,
        stored: Stored,
        groups: OrderedDict[tuple[str, int], Any],
        *,
        bbox_format: str,
        bbox_units: str,
        edges: EdgeCount,
    ) -> None:
        self.stored, self._groups, self._edges = stored, groups, edges
        self._read_line = partial(parse_layout, bbox_format=bbox_format, bbox_units=bbox_units)
        footer, schema = self._with_file(lambda file: (file.metadata, file.schema_arrow))
        self._columns = [name for name in _COLUMNS if name in schema.names]
        try:
            self._names = class_names(schema.metadata)
        except ValueError:
            self._names = []
        for column in ("image", "objects"):
            if column not in self._columns:
                hint = "its columns are image, caption and objects {bbox, phrase}"
                raise InputError(f"has no column {column!r}", location=self.name, hint=hint)
        image = schema.field("image").type
        self._states_paths = hasattr(image, "get_field_index") and image.get_field_index("path") >= 0
        groups_of = [footer.row_group(n) for n in range(footer.num_row_groups)]
        self.blocks = tuple(group.num_rows for group in groups_of)
        if not sum(self.blocks):
            raise InputError("holds no row", location=self.name)
        self.run = max(self.blocks)
        self._starts = np.cumsum([0, *self.blocks])
        # What is known without reading the rows: where they begin, and how long each group is.
        known = [Path(self.name).name, stored.size, [(group.num_rows, group.total_byte_size) for group in groups_of]]
        self._digest = digest(repr(known).encode())

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> np.ndarray | None:
        """ "content" is not of the images, which are not read, but of the shard and the row's number. "key" reads the column of
        the paths that the images state alone; of rows that state none it is "content"."""
        if name == "meta":
            return np.full(len(self), self._digest, dtype=np.uint64)
        if name not in ("content", "key"):
            return None
        with np.errstate(over="ignore"):  # splitmix64, a public-domain mixer by Sebastiano Vigna
            z = np.uint64(self._digest) + np.arange(1, len(self) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            content: np.ndarray = z ^ (z >> np.uint64(31))
        if name == "key" and self._states_paths:
            table = self._with_file(lambda file: file.read(columns=["image.path"]))
            for index, image in enumerate(table.column("image").to_pylist()):
                if stated := _name(image):
                    content[index] = name_key(stated)
        return content

    def record(self, index: int) -> ShardRecord:
        location = f"{self.name}: row {index}"
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        (row,) = self._group(group).slice(index - int(self._starts[group]), 1).to_pylist()
        image = row["image"]
        content = image.get("bytes") if isinstance(image, Mapping) else image
        if not isinstance(content, bytes) or not content:
            hint = "embed the images, as `datasets` does with push_to_hub or to_parquet"
            raise InputError("its image holds no bytes", location=location, hint=hint)
        clipped: Clipped = []
        conventions = {key: row[key] for key in ("bbox_format", "bbox_units") if row.get(key) is not None}
        try:
            line = {**line_of(row, self._names, location), **conventions}
            layout = self._read_line(line, partial(image_size, content), clipped=clipped)
        except InputError as error:
            raise error if (error.location or "").startswith(location) else error.at(location) from None
        for by, place in clipped:
            self._edges.add(by, f"{location}: {place}")
        name = Path(self.name) / str(index) / (_name(image) or f"row-{index}")
        return ShardRecord(image=name, layout=layout, location=location, read=lambda: content)

    def read_group(self, group: int) -> Any:
        """One row group as a pyarrow table. Raises `InputError` where it cannot be read."""
        return self._with_file(lambda file: file.read_row_group(group, columns=self._columns))

    def _group(self, group: int) -> Any:
        key = (self.name, group)
        if key not in self._groups:
            self._groups[key] = self.read_group(group)
            if len(self._groups) > KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _with_file(self, use: Callable[[Any], Any]) -> Any:
        parquet = import_or_explain("pyarrow.parquet", self.name)

        def attempt() -> Any:
            with self.stored.open(block=_BLOCK) as source:
                return use(parquet.ParquetFile(source))

        return self.stored.again(attempt)


def _name(image: Any) -> str:
    """The file name that an image states; "" where it states none."""
    path = image.get("path") if isinstance(image, Mapping) else None
    name = Path(path).name if isinstance(path, str) else ""
    return "" if name == ".." else name
