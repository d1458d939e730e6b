"""Parquet as Hugging Face `datasets` writes it: an image column, a caption, objects. Its boxes' convention is declared, never guessed.

Source of the format: the pages "Object detection" and "Image feature" of the `datasets` documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from mmdit_lora.boxes import READINGS, Boxed, evidence, four_numbers
from mmdit_lora.data.formats.common import Context, Convention, RawBox, Reads, Sample, Unit, need, size_of, text
from mmdit_lora.data.formats.tables import each, import_or_explain, rows, table_files
from mmdit_lora.errors import InputError
from mmdit_lora.files import decode_text
from mmdit_lora.json_files import parse_object

_CAPTIONS = ("caption", "text", "prompt")
_KEY = "huggingface in the schema's metadata"
_PHRASES = ("phrase", "category", "label", "name")
_SAMPLED = 200  # rows, for the evidence


def read_hugging_face(context: Context) -> Reads:
    """Rows of parquet files: `image`, `caption` (or `text`, `prompt`), `objects` {bbox, phrase (or category, label, name)}.

    Numbers of classes get their names from the features that `datasets` stores in the file.

    Raises:
        InputError: the convention of the boxes was not declared; the message has the evidence for each reading. A record:
            a column is missing, or wrong.
    """
    paths = table_files(context, ".parquet")
    names = {path: _class_names_of(path) for path in paths}
    if context.bbox_format is None or context.bbox_units is None:
        raise InputError(
            f"does not say how its boxes are written. {_evidence(context, paths)}",
            location=str(context.src),
            hint="declare both --bbox-format and --bbox-units",
        )
    for path in paths:
        yield from each(rows([path]), partial(_sample, names=names[path], context=context))


def _sample(row: Any, location: str, names: list[str], context: Context) -> Sample:
    image = context.unpacked(need(row, "image", location), _stem(row), location)
    order, unit = cast("Convention", context.bbox_format), cast("Unit", context.bbox_units)
    boxes = (
        RawBox(place := f"{location}: objects[{index}]", value, text(_named(label, names, place), "the phrase", place))
        for index, (value, label) in enumerate(_objects(row, location))
    )
    things = context.things(boxes, order, unit=unit, size=size_of(image, location))
    caption = next((row[key] for key in _CAPTIONS if row.get(key)), None)
    return Sample(image, location, things, None if caption is None else text(caption, "the caption", location))


def line_of(row: Mapping[str, Any], names: list[str], location: str) -> dict[str, Any]:
    """`caption` and `objects` of a row as a line of metadata.jsonl has them; its boxes' numbers as they stand.

    Args:
        names: of the classes, for rows that number them (`class_names`).

    Raises:
        InputError: a column is missing, or wrong, with `location`.
    """
    pairs = list(_objects(row, location))
    caption = next((row[key] for key in _CAPTIONS if row.get(key)), "")
    phrases = [_named(label, names, f"{location}: objects[{index}]") for index, (_, label) in enumerate(pairs)]
    return {"caption": caption, "objects": {"bbox": [box for box, _ in pairs], "phrase": phrases}}


def class_names(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The names of the classes, from the metadata of a parquet file's schema. Raises `ValueError` where that is no JSON."""
    stored = parse_object(decode_text((metadata or {}).get(b"huggingface", b"{}"), location=_KEY), location=_KEY)
    features = (stored.get("info") or {}).get("features") or {}
    return _label_names(features.get("objects"))


def _objects(row: Any, location: str) -> Iterator[tuple[Any, Any]]:
    """(box, phrase or class) from a struct of lists, or from a list of structs."""
    objects = need(row, "objects", location)
    if isinstance(objects, list):
        for index, entry in enumerate(objects):
            place = f"{location}: objects[{index}]"
            yield need(entry, "bbox", place), _phrase(entry, place)
        return
    boxes, labels = need(objects, "bbox", location), _phrase(objects, location)
    if not isinstance(boxes, list) or not isinstance(labels, list) or len(boxes) != len(labels):
        raise InputError("objects has not as many phrases as boxes", location=location)
    yield from zip(boxes, labels, strict=True)


def _phrase(entry: Any, location: str) -> Any:
    values = [entry[key] for key in _PHRASES if isinstance(entry, Mapping) and entry.get(key) is not None]
    if not values:
        raise InputError(f"objects has none of {', '.join(_PHRASES)}", location=location)
    return values[0]


def _named(label: Any, names: list[str], location: str) -> Any:
    if not isinstance(label, int):
        return label
    if not 0 <= label < len(names):
        raise InputError(f"class {label} has no name (the file names {len(names)})", location=location)
    return names[label]


def _class_names_of(path: Path) -> list[str]:
    parquet = import_or_explain("pyarrow.parquet", str(path))
    try:
        return class_names(parquet.read_schema(path).metadata)
    except (OSError, ValueError) as error:
        raise InputError(f"is no readable parquet file ({str(error).splitlines()[0]})", location=str(path)) from None


def _label_names(feature: Any) -> list[str]:
    """The names of the first ClassLabel in a feature, however deep it lies."""
    if isinstance(feature, Mapping):
        if feature.get("_type") == "ClassLabel":
            return [str(name) for name in feature.get("names", [])]
        feature = list(feature.values())
    if isinstance(feature, list):
        return next((names for part in feature if (names := _label_names(part))), [])
    return []


def _stem(row: Any) -> str:
    image = row.get("image")
    name = image.get("path") if isinstance(image, Mapping) else None
    return Path(name).stem if isinstance(name, str) and name else str(row.get("image_id", "image"))


def _evidence(context: Context, paths: list[Path]) -> str:
    """For each reading the share of boxes that it makes wrong: inverted, or outside the image."""
    sets = []
    for location, row in islice(rows(paths), _SAMPLED):
        if isinstance(row, Mapping) and row.get("image") is not None and row.get("objects") is not None:
            size = size_of(context.unpacked(row["image"], _stem(row), location), location)
            sets.append(Boxed([four for value, _ in _objects(row, location) if (four := four_numbers(value))], size))
    found = evidence(sets, READINGS[0])
    if found is None:
        return "There is no box."
    wrong = sorted(found.wrong.items(), key=lambda item: item[1])
    shares = ", ".join(f"{order} {unit} {count / found.total:.0%}" for (order, unit), count in wrong)
    return f"Of {found.total} boxes, each reading makes wrong: {shares}"
