"""Rows of tables, whatever file they lie in (parquet, JSON lines, a JSON list, csv, tsv), and formats whose records are rows."""

from __future__ import annotations

import base64
import codecs
import csv
import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import (
    Context,
    Convention,
    RawBox,
    Reads,
    Sample,
    Unit,
    items_of,
    need,
    need_text,
    size_of,
    stated_size,
    text,
)
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.files import require_file
from mmdit_lora.json_files import JSON_LIMIT, parse_json, read_json
from mmdit_lora.layout import read_json_records

_LONGEST_FIELD = 256 * 2**20  # characters; images in base64

Row = tuple[str, Any]  # (location, content or the error of that row)
Boxes = Callable[[Any, str, Context], Iterable[RawBox]]


def columns(key: str, short: str, long: str = "") -> Boxes:
    """Boxes of a list `key` of objects {"bbox": four numbers, `short`: text, `long`: the longer text}; it may be JSON text."""

    def boxes(row: Any, location: str, _: Context) -> Iterator[RawBox]:
        value = need(row, key, location)
        if isinstance(value, str):
            row = {key: parse_json(value, location=f"{location}: {key}")}
        for index, entry in enumerate(items_of(row, key, location)):
            place = f"{location}: {key}[{index}]"
            yield RawBox(place, need(entry, "bbox", place), entry.get(short), entry.get(long))

    return boxes


@dataclass(frozen=True)
class Table:
    """A format whose records are rows; an instance is its reader.

    The image is that of the row's column `image`, else the file that `file_name` or the column `stem` names.

    Args:
        boxes: (row, location, context) -> the row's boxes as they stand, `order` in `unit`.
        caption: column of the caption.
        prepare: (row, location, context) -> the row with these columns, for rows that nest or name them in another way.
        stem: column of the image's name without extension.
        size: columns of (width, height) that boxes in pixels refer to; None: the image's own.
        suffixes: of the files, the likeliest first. header: names of a tsv file's columns.
        base64: whether the text in the column `image` is the image, not its name.
    """

    boxes: Boxes
    caption: str = "caption"
    order: Convention = "xyxy"
    unit: Unit = "pixel"
    prepare: Callable[[Any, str, Context], Any] | None = None
    stem: str = "file_name"
    size: tuple[str, str] | None = ("width", "height")
    suffixes: tuple[str, ...] = (".parquet", ".jsonl", ".json")
    header: list[str] | None = None
    base64: bool = False

    def __call__(self, context: Context) -> Reads:
        table = rows(table_files(context, *self.suffixes), header=self.header)
        return each(table, partial(self.sample, context=context))

    def sample(self, row: Any, location: str, context: Context) -> Sample:
        """The record of one row. Raises `InputError`."""
        row = self.prepare(row, location, context) if self.prepare else row
        caption = need_text(row, self.caption, location)
        image = self._image(row, location, context)
        if self.unit == "relative":
            things = context.things(self.boxes(row, location, context), self.order, image=image)
        else:
            if self.size is None:
                size = size_of(image, location)
            else:
                width, height = (need(row, key, location) for key in self.size)
                size = stated_size(image, (width, height), location)
            things = context.things(self.boxes(row, location, context), self.order, unit=self.unit, size=size)
        return Sample(image, location, things, caption)

    def _image(self, row: Any, location: str, context: Context) -> Path:
        image, stem = row.get("image"), str(row.get(self.stem) or "")
        if self.base64 and image:
            try:
                image = base64.b64decode(text(image, "image", location), validate=True)
            except ValueError as error:  # binascii.Error is one
                if isinstance(error, InputError):
                    raise
                raise InputError(f"its image is no base64 ({error})", location=location) from None
        if isinstance(image, bytes | Mapping):
            return context.unpacked(image, stem or location, location)
        name = image if isinstance(image, str) and image else row.get("file_name") or stem
        return context.image_finder.find(text(name, "the image's name", location), location)


def import_or_explain(module: str, location: str) -> Any:
    """A module of the extra `formats`. Raises `InputError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        hint = f"install it: `uv sync --extra formats`, or `pip install {package}`"
        raise InputError(f"needs {package} to be read", location=location, hint=hint) from None


def table_files(context: Context, *suffixes: str) -> list[Path]:
    """The source, if it is a file; else the files below it with these suffixes, of `--split` if that is given.

    A file belongs to a split if its name, or a folder on the way to it, is or begins with the split's name.

    Raises:
        InputError: there is no such file.
    """
    src, split = context.src, context.split
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise InputError("no such folder or file", location=str(src), hint=f"give a file: {', '.join(suffixes)}")
    files = sorted(path for path in src.rglob("*") if path.suffix in suffixes and path.is_file())
    # Of one kind, the first that there is: SA-1B, say, has a json file of its own beside each image.
    found = next((some for suffix in suffixes if (some := [path for path in files if path.suffix == suffix])), [])
    if not found:
        raise InputError(f"holds no file of {', '.join(suffixes)}", location=str(src))
    if split is None:
        return found

    def belongs(path: Path) -> bool:
        return any(p == split or p.startswith((f"{split}-", f"{split}.")) for p in path.relative_to(src).parts)

    if not (of_split := [path for path in found if belongs(path)]):
        raise unknown_key(split, [path.relative_to(src).as_posix() for path in found], location="--split")
    return of_split


def rows(paths: Iterable[Path], *, header: list[str] | None = None, without: Collection[str] = ()) -> Iterator[Row]:
    """(location, row) of every row: `FILE:LINE`, `FILE[INDEX]` of a JSON list, or `FILE: row N` of parquet.

    A row that cannot be read comes as an `InputError` in the row's place.

    Args:
        header: names of the columns of csv and tsv files that do not begin with them.
        without: columns of parquet files that are not read (images, where only the boxes are wanted).

    Raises:
        InputError: a file cannot be read at all.
    """
    for path in paths:
        match path.suffix:
            case ".parquet":
                yield from _parquet(path, without)
            case ".jsonl":
                yield from read_json_records(path, what="annotation file", limit=JSON_LIMIT)
            case ".csv" | ".tsv":
                yield from _separated(path, header)
            case _:
                data = read_json(path)
                is_list = isinstance(data, list)
                yield from ((f"{path}[{n}]", item) for n, item in enumerate(data)) if is_list else [(str(path), data)]


def each(table: Iterable[Row], parse: Callable[[Any, str], Sample]) -> Reads:
    """The reads of rows: `parse(row, location)`, or the row's error."""
    return (partial(_one, location, row, parse) for location, row in table)


def _one(location: str, row: Any, parse: Callable[[Any, str], Sample]) -> Sample:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, Mapping):
        raise InputError(f"is {type(row).__name__}, not an object", location=location)
    return parse(row, location)


def _parquet(path: Path, without: Collection[str]) -> Iterator[Row]:
    parquet = import_or_explain("pyarrow.parquet", str(path))
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            chosen = [name for name in file.schema_arrow.names if name not in without] if without else None
            for batch in file.iter_batches(batch_size=64, columns=chosen):  # rows may hold whole images
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", row
                    index += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise InputError(f"is no readable parquet file ({str(error).splitlines()[0]})", location=str(path)) from None


def _separated(path: Path, header: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    names, line = header, 0
    form: dict[str, Any] = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        with require_file(path, what="table").open("rb") as head:
            wide = head.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with path.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            reader = csv.reader(file, **form)
            for values in reader:
                line = reader.line_num
                location = f"{path}:{line}"
                if not values:
                    continue
                if names is None:
                    names = [name.strip() for name in values]
                elif len(values) != len(names):
                    what = f"has {len(values)} columns, not {len(names)} ({', '.join(names)})"
                    yield location, InputError(what, location=location)
                else:
                    yield location, dict(zip(names, values, strict=True))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"is no table of UTF-8 text ({error})", location=f"{path}:{line + 1}") from None
