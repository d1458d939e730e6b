"""Whatever stands in a file that is JSON or YAML: its reader answers with records and `InputError`s, never with another error."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdit_lora.data.formats import read_format
from mmdit_lora.errors import InputError
from tests.format_makers import (
    BOX,
    CAPTION,
    MAKERS,
    PHRASE,
    coco_data,
    dense_layout_row,
    eligen_row,
    grit_row,
    hico_entry,
    instances,
    label_studio_task,
    layout_sam_row,
    options,
    sacap_row,
)

JUNK = [
    None,
    True,
    0,
    -1,
    7,
    1.5,
    1e308,
    10**400,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [[]],
    [None],
    ["x"],
    {},
    {"x": 1},
    [1, 2],
    [0, 0, 1, 1],
]
ROUNDS = 60

# format -> (the file that is spoilt, its content, how content becomes text)
FILES: dict[str, tuple[str, Any, Callable[[Any], str]]] = {
    "coco": ("annotations/instances_val.json", coco_data(), json.dumps),
    "labelstudio": ("export.json", [label_studio_task(), label_studio_task(points=[[1, 2], [3, 4]])], json.dumps),
    "simpletuner": ("a.bbox", [{"label": PHRASE, "bbox": list(BOX)}], json.dumps),
    "comfyui": ("a.json", [[{"x": 1, "y": 1, "width": 9, "height": 9, "metadata": {"desc": "x"}}]], json.dumps),
    "layoutsam": ("train.jsonl", layout_sam_row(), json.dumps),
    "denselayout": ("test.jsonl", dense_layout_row(), json.dumps),
    "sacap": ("train.jsonl", sacap_row(), json.dumps),
    "cocomig": ("mig_bench_anno.yaml", {CAPTION: {PHRASE: [list(BOX)], "coco_id": 139}}, yaml.safe_dump),
    "grit": ("grit.jsonl", grit_row(), json.dumps),
    "hico": ("hico.json", [hico_entry()], json.dumps),
    "instancediffusion": ("one.json", instances(), json.dumps),
    "eligen": ("metadata.json", [eligen_row()], json.dumps),
    "yolo": ("data.yaml", {"names": {0: PHRASE, 1: "x"}}, yaml.safe_dump),
}


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield from places(value, (*at, key))


def spoilt(data: Any, draw: random.Random) -> Any:
    """The data with one value, at any depth, replaced or removed."""
    at = draw.choice(list(places(data)))
    if not at:
        return draw.choice(JUNK)
    data = copy.deepcopy(data)
    holder = data
    for key in at[:-1]:
        holder = holder[key]
    if draw.random() < 0.2:
        del holder[at[-1]]
    else:
        holder[at[-1]] = draw.choice(JUNK)
    return data


@pytest.mark.parametrize("name", FILES)
def test_spoilt_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    file, right, dump = FILES[name]
    MAKERS[name](tmp_path)
    for path in tmp_path.rglob("*.parquet"):
        path.unlink()
    refused = 0
    for number in range(ROUNDS):
        content = spoilt(right, random.Random(f"{name} {number}"))
        path = tmp_path / file
        try:
            content = dump(content)
        except yaml.YAMLError:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            found = read_format(name, tmp_path, collect_errors=True, **options(name, tmp_path))
            refused += len(found.errors)
        except InputError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{content[:500]!r} gives {type(error).__name__}") from error
    assert refused > ROUNDS // 10


# Files that are no JSON: pieces of their text are replaced.
TEXTS = {
    "voc": "Annotations/0.xml",
    "yolo": "labels/train/a.txt",
    "openimages": "validation-annotations-bbox.csv",
    "cvat": "annotations.xml",
    "flickr30k": "Annotations/36979.xml",
    "gligen": "train-00.tsv",
    "cocomig": "mig_bench_anno.yaml",
    "simpletuner": "a.bbox",
}
PIECES = [
    "",
    "\0",
    "\n",
    '"',
    "<",
    ">",
    "&amp;",
    ",",
    ";",
    "\t",
    "-1",
    "1e999",
    "nan",
    "0x1",
    "\ud800",
    "é",
    "[",
    "}",
    " ",
    "٣",
    "²",
]


@pytest.mark.parametrize("name", TEXTS)
def test_spoilt_texts_are_read_or_refused(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    path = tmp_path / TEXTS[name]
    right = path.read_text("utf-8")
    refused = 0
    for number in range(ROUNDS):
        draw = random.Random(f"{name} {number}")
        start = draw.randrange(min(len(right), 600))
        content = right[:start] + draw.choice(PIECES) + right[start + draw.choice([0, 1, 3, 9]) :]
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            found = read_format(name, tmp_path, collect_errors=True, **options(name, tmp_path))
            refused += len(found.errors)
        except InputError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{content[:500]!r} gives {type(error).__name__}") from error
    assert refused > ROUNDS // 10
