"""A small set of every format, made from its stated fields: one picture of 40 x 20 pixels, and in it `BOX`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data_makers import annotation, dataset, line, objects, picture, voc

BOX = (0.25, 0.2, 0.75, 0.8)  # pixels: 10, 4, 30, 16
PHRASE = "a red ball"
CAPTION = "a red ball in the grass"


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def coco_data(**changes: Any) -> dict[str, Any]:
    right = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 4, 20, 12], "iscrowd": 0}],
        "categories": [{"id": 3, "name": PHRASE}],
    }
    return right | changes


def make_jsonl(folder: Path) -> None:
    dataset(folder, line(caption=CAPTION, objects=objects([list(BOX)], [PHRASE])))


def make_voc(folder: Path) -> None:
    voc(folder, annotation([(PHRASE, 11, 5, 30, 16)]))


def make_coco(folder: Path) -> None:
    picture(folder / "val" / "a.png")
    write(folder / "annotations" / "instances_val.json", coco_data())
    captions = [{"id": 1, "image_id": 7, "caption": CAPTION}, {"id": 2, "image_id": 7, "caption": "another"}]
    write(folder / "annotations" / "captions_val.json", {"annotations": captions})


def make_yolo(folder: Path) -> None:
    picture(folder / "images" / "train" / "a.png")
    write(folder / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.6\n")
    write(folder / "data.yaml", f"train: images/train\nnames:\n  0: {PHRASE}\n")


MAKERS: dict[str, Callable[[Path], None]] = {
    "jsonl": make_jsonl,
    "voc": make_voc,
    "coco": make_coco,
    "yolo": make_yolo,
}
# Formats that hold no caption: there it is made of the phrases.
WITHOUT_CAPTION = {"voc", "yolo"}
# Where the source is a file of the folder, or needs an option.
SOURCES: dict[str, str] = {}
OPTIONS: dict[str, dict[str, Any]] = {}


def source(name: str, folder: Path) -> Path:
    return folder / SOURCES.get(name, "")
