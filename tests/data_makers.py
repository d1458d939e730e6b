"""Small data sets for tests: images, metadata.jsonl folders, Pascal VOC folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def make_image(path: Path, size: tuple[int, int] = (40, 20), **save: Any) -> Path:
    """An image whose pixels say where they are: red grows to the right, green downwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.putdata([(6 * x % 256, 6 * y % 256, 0) for y in range(size[1]) for x in range(size[0])])
    image.save(path, **save)
    return path


def line(name: str = "a.png", **changes: Any) -> dict[str, Any]:
    """A right line of metadata.jsonl, with changes; `...` removes a key."""
    right = {
        "file_name": name,
        "caption": "a red circle and a blue square",
        "objects": {"bbox": [[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 1.0]], "phrase": ["a red circle", "a blue square"]},
    }
    return {key: value for key, value in (right | changes).items() if value is not ...}


def objects(bbox: Any, phrase: Any = None) -> dict[str, Any]:
    return {"bbox": bbox, "phrase": ["a thing"] * len(bbox) if phrase is None else phrase}


def dataset(folder: Path, *lines: dict[str, Any] | str) -> Path:
    """A data set folder of images a.png and b.png with the given lines (or text as it stands); one right line if none."""
    make_image(folder / "a.png")
    make_image(folder / "b.png", (20, 40))
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in lines or (line(),)]
    (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def annotation(
    boxes: Sequence[tuple[str, float, float, float, float]] = (("RBC", 1, 1, 20, 10),),
    *,
    size: tuple[int, int] = (40, 20),
    filename: str = "0.png",
) -> str:
    things = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    head = f"<filename>{filename}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{head}{things}</annotation>"


def voc(folder: Path, *annotations: str, **splits: Sequence[str]) -> Path:
    """A VOC folder with images 0.png, 1.png, ... of 40 x 20 pixels and one annotation each."""
    (folder / "Annotations").mkdir(parents=True)
    for index, text in enumerate(annotations or (annotation(),)):
        make_image(folder / "JPEGImages" / f"{index}.png")
        (folder / "Annotations" / f"{index}.xml").write_text(text, encoding="utf-8")
    for name, members in splits.items():
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(members) + "\n")
    return folder
