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


OPEN_IMAGES_HEAD = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


def make_openimages(folder: Path) -> None:
    picture(folder / "images" / "a.jpg")
    lines = "a,xclick,/m/01,1,0.25,0.75,0.2,0.8,0,0,0,0,0\n"
    write(folder / "validation-annotations-bbox.csv", OPEN_IMAGES_HEAD + lines)
    write(folder / "class-descriptions-boxable.csv", "/m/01,A red ball\n/m/02,Cat\n")


def label_studio_task(**value: Any) -> dict[str, Any]:
    shape = {"x": 25, "y": 20, "width": 50, "height": 60, "rotation": 0, "rectanglelabels": [PHRASE]} | value
    shape = {key: entry for key, entry in shape.items() if entry is not ...}
    result = {"type": "rectanglelabels", "original_width": 40, "original_height": 20, "value": shape}
    caption = {"type": "textarea", "value": {"text": [CAPTION]}}
    data = {"image": "/data/upload/1/0a1b2c3d-a.png"}
    return {
        "id": 1,
        "data": data,
        "annotations": [{"was_cancelled": True, "result": []}, {"result": [result, caption]}],
    }


def make_labelstudio(folder: Path) -> None:
    picture(folder / "images" / "a.png")
    write(folder / "export.json", [label_studio_task()])


def cvat_text(shapes: str, size: tuple[int, int] = (40, 20)) -> str:
    image = f'<image id="0" name="sub/a.png" width="{size[0]}" height="{size[1]}">{shapes}</image>'
    return f"<annotations><version>1.1</version><meta/>{image}</annotations>"


def make_cvat(folder: Path) -> None:
    picture(folder / "images" / "sub" / "a.png")
    box = f'<box label="{PHRASE}" xtl="10" ytl="4" xbr="30" ybr="16" occluded="0" z_order="0"/>'
    write(folder / "annotations.xml", cvat_text(box))


def make_simpletuner(folder: Path) -> None:
    picture(folder / "a.png")
    write(folder / "a.bbox", [{"label": PHRASE, "bbox": list(BOX)}])
    write(folder / "a.txt", CAPTION)


def make_comfyui(folder: Path) -> None:
    picture(folder / "a.png")
    entry = {"x": 10, "y": 4, "width": 20, "height": 12, "metadata": {"name": "ball", "desc": PHRASE}}
    write(folder / "a.json", [[entry]])
    write(folder / "a.txt", CAPTION)


MAKERS: dict[str, Callable[[Path], None]] = {
    "jsonl": make_jsonl,
    "voc": make_voc,
    "coco": make_coco,
    "yolo": make_yolo,
    "openimages": make_openimages,
    "labelstudio": make_labelstudio,
    "cvat": make_cvat,
    "simpletuner": make_simpletuner,
    "comfyui": make_comfyui,
}
# Formats that hold no caption: there it is made of the phrases.
WITHOUT_CAPTION = {"voc", "yolo", "openimages", "cvat"}
# Where the source is a file of the folder, or needs an option.
SOURCES: dict[str, str] = {"labelstudio": "export.json"}
OPTIONS: dict[str, dict[str, Any]] = {}


def source(name: str, folder: Path) -> Path:
    return folder / SOURCES.get(name, "")
