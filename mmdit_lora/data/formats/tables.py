"""Rows of tables, whatever file they lie in: parquet, JSON lines, a JSON list, csv, tsv."""

from __future__ import annotations

import codecs
import csv
import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import Context, Reads, Sample
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.files import require_file
from mmdit_lora.json_files import JSON_LIMIT, read_json
from mmdit_lora.layout import read_json_records

_LONGEST_FIELD = 256 * 2**20  # characters; images in base64

Row = tuple[str, Any]  # (where, content or the error of that row)


def import_or_explain(module: str, location: str) -> Any:
    """A module of the extra `formats`. Raises `InputError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise InputError(
            f"needs {package} to be read",
            location=location,
            hint=f"install it: `uv sync --extra formats`, or `pip install {package}`",
        ) from None


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
    of_split = [
        path
        for path in found
        if any(p == split or p.startswith((f"{split}-", f"{split}.")) for p in path.relative_to(src).parts)
    ]
    if not of_split:
        raise unknown_key(split, [path.relative_to(src).as_posix() for path in found], location="--split")
    return of_split


def rows(paths: Iterable[Path], *, header: list[str] | None = None, without: Collection[str] = ()) -> Iterator[Row]:
    """(where, row) of every row: `FILE:LINE`, `FILE[INDEX]` of a JSON list, or `FILE: row N` of parquet.

    A row that cannot be read comes as an `InputError` in the row's place.

    Args:
        header: names of the columns of csv and tsv files that do not begin with them.
        without: columns of parquet files that are not read (images, where only the boxes are wanted).

    Raises:
        InputError: a file cannot be read at all.
    """
    for path in paths:
        if path.suffix == ".parquet":
            yield from _parquet(path, without)
        else:
            yield from _READERS.get(path.suffix, _json)(path, header)


def each(table: Iterable[Row], parse: Callable[[Any, str], Sample]) -> Reads:
    """The reads of rows: `parse(row, where)`, or the row's error."""
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
            columns = [name for name in file.schema_arrow.names if name not in without] if without else None
            for batch in file.iter_batches(batch_size=64, columns=columns):  # rows may hold whole images
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", row
                    index += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these
        raise InputError(f"is no readable parquet file ({str(error).splitlines()[0]})", location=str(path)) from None


def _lines(path: Path, _: list[str] | None) -> Iterator[Row]:
    yield from read_json_records(path, what="annotation file", limit=JSON_LIMIT)


def _json(path: Path, _: list[str] | None) -> Iterator[Row]:
    data = read_json(path)
    if not isinstance(data, list):
        yield str(path), data
        return
    for index, item in enumerate(data):
        yield f"{path}[{index}]", item


def _separated(path: Path, header: list[str] | None, *, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    names, line = header, 0
    try:
        with require_file(path, what="table").open("rb") as head:
            wide = head.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with path.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
            if delimiter == ",":
                reader = csv.reader(file)
            else:
                reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
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


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
}
