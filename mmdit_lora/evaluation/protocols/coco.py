"""COCO layouts: AP and AR of a detector on the painted images against the boxes that were asked for, by pycocotools.

Which images and boxes: the filter of CreatiLayout for COCO 2017, as its author and a user who got the paper's counts state it
(github.com/HuiZhang0812/CreatiLayout, issue 9):

    1. no image with a crowd (`iscrowd`), none with more than 3 persons (counted before the next step)
    2. boxes of less than 2 % of the image's area are left out
    3. images with 2 to 10 boxes remain (the paper: 61,002 of train, 2,565 of val)

AP, AR: COCO's own definitions (cocodataset.org, "Detection Evaluation"; pycocotools.cocoeval), on the boxes that remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.coco import Instances, annotation_box, read_instances
from mmdit_lora.data.formats.common import Context, four, need, number, text
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.metrics import coco_figures
from mmdit_lora.evaluation.protocols.common import (
    Case,
    PublishedProtocol,
    Seen,
    Thing,
    checked,
    layout_of,
    paired,
    stated_size,
)
from mmdit_lora.files import write_json

SMALLEST = 0.02  # of the image's area
BOXES = (2, 10)
PERSONS = 3


class CocoLayout(PublishedProtocol):
    """`annotations/instances_*.json` with `captions_*.json` beside it. Detectors label things with COCO's names."""

    name = "coco"
    title = "COCO layout"
    source = "pycocotools.cocoeval; the filter: github.com/HuiZhang0812/CreatiLayout issue 9, arXiv 2412.03859"
    metrics = {  # noqa: RUF012
        "ap": "average precision, mean over IoU 0.50 to 0.95 and over categories",
        "ap50": "at IoU 0.50",
        "ap75": "at IoU 0.75",
        "ap_small": "of things below 32 x 32 pixels",
        "ap_medium": "of things up to 96 x 96 pixels",
        "ap_large": "of larger ones",
        "ar_1": "average recall with one detection an image",
        "ar_10": "with ten",
        "ar_100": "with a hundred",
    }
    deviations = (
        "things that were left out by the filter are no ground truth: a detector that sees them painted is charged",
        "published figures differ in detector and selection of images; each row says which, where it is known",
    )

    def read(self, path: str | Path) -> list[Case]:
        """An instances file, or a COCO folder whose `annotations` holds exactly one; the caption is the first of its captions."""
        path = _instances_file(Path(path))
        said = read_instances(path)
        for _, location in said.strays:
            raise InputError("its image_id is that of no image", location=location)
        cases = [_case(image, location, own, said, path) for image, location, own in said.images]
        return checked([case for case in cases if case is not None], path)

    def score(self, cases: Sequence[Case], seen: Sequence[Seen]) -> dict[str, float]:
        """COCO's twelve figures, without those that no thing decides (e.g. `ap_small` without small things)."""
        pairs = paired(cases, seen)
        cases = [case for case, _ in pairs]
        truth = _truth(cases)
        results = [entry | {"area": entry["bbox"][2] * entry["bbox"][3]} for entry in _results(pairs)]
        return coco_figures(truth["images"], truth["categories"], truth["annotations"], results)

    def write_results(self, cases: Sequence[Case], seen: Sequence[Seen], out: str | Path) -> list[Path]:
        """The detections in COCO's result format, and the filtered ground truth that they are scored against."""
        pairs = paired(cases, seen)
        split = cases[0].extra["split"]
        files = [
            Path(out) / f"detections_{split}_mmdit_lora_results.json",
            Path(out) / f"instances_{split}_filtered.json",
        ]
        write_json(files[0], _results(pairs))
        write_json(files[1], _truth(cases))
        return files


def _instances_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted((path / "annotations").glob("instances_*.json")) if path.is_dir() else []
    if len(found) != 1:
        what = f"holds {len(found)} annotations/instances_*.json" if path.is_dir() else "no such file or folder"
        raise InputError(what, location=str(path), hint="give the instances file itself, e.g. instances_val2017.json")
    return found[0]


def _case(image: Any, location: str, own: list[tuple[Any, str]], said: Instances, path: Path) -> Case | None:
    """The image's case, or None where the filter leaves it out."""
    size = stated_size(image, location)
    file = text(need(image, "file_name", location), "file_name", location)
    if any(annotation.get("iscrowd") for annotation, _ in own):
        return None
    things: list[Thing] = []
    truth: list[dict[str, Any]] = []
    persons = 0
    for annotation, place in own:
        category = said.category(annotation, place)
        persons += said.names[category].lower() == "person"
        left, top, across, down = four(annotation_box(annotation, size, place), place)
        Context(path).box(
            (left, top, across, down), "xywh", place, unit="pixel", size=size, around=True
        )  # for what it refuses
        if across * down < SMALLEST * size[0] * size[1]:
            continue
        xyxy = (left / size[0], top / size[1], (left + across) / size[0], (top + down) / size[1])
        name = said.names[category]
        things.append(Thing(xyxy, name, name.lower(), key=str(len(things))))
        area = annotation.get("area")
        truth.append(
            {
                "id": annotation.get("id", 0),
                "category_id": category,
                "bbox": [left, top, across, down],
                "area": across * down if area is None else number(area, place),
            }
        )
    if persons > PERSONS or not BOXES[0] <= len(things) <= BOXES[1]:
        return None
    phrases = ", ".join(dict.fromkeys(thing.phrase for thing in things))
    caption = said.captions.get(image["id"], f"a photo of {phrases}")
    extra = {
        "image_id": image["id"],
        "file_name": file,
        "truth": truth,
        "categories": said.names,
        "split": path.stem.removeprefix("instances_"),
    }
    stem = Path(file).stem
    return Case(
        str(image["id"]), layout_of(caption, things, location), size, tuple(things), (file,), (stem,), location, extra
    )


def _images(cases: Sequence[Case]) -> list[dict[str, Any]]:
    return [
        {"id": c.extra["image_id"], "file_name": c.extra["file_name"], "width": c.size[0], "height": c.size[1]}
        for c in cases
    ]


def _categories(cases: Sequence[Case]) -> list[dict[str, Any]]:
    names: Mapping[Any, str] = cases[0].extra["categories"]
    return [{"id": number, "name": name} for number, name in names.items()]


def _truth(cases: Sequence[Case]) -> dict[str, Any]:
    """The filtered ground truth in COCO's structure. Annotations are numbered anew: pycocotools takes an id of 0 for none."""
    entries = [entry | {"image_id": case.extra["image_id"]} for case in cases for entry in case.extra["truth"]]
    annotations = [entry | {"id": number, "iscrowd": 0} for number, entry in enumerate(entries, start=1)]
    return {"images": _images(cases), "annotations": annotations, "categories": _categories(cases)}


def _results(pairs: Sequence[tuple[Case, Seen]]) -> list[dict[str, Any]]:
    """COCO's result format: image_id, category_id, bbox (xywh in pixels of the stated size), score.

    Detections whose label is no category's name are left out.
    """
    out = []
    for case, seen in pairs:
        ids = {name.strip().lower(): number for number, name in case.extra["categories"].items()}
        width, height = case.size
        for found in seen.detections or ():
            category = ids.get(found.label.strip().lower())
            if category is not None:
                x0, y0, x1, y1 = (float(v) for v in found.xyxy)
                bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                entry = {"image_id": case.extra["image_id"], "category_id": category, "bbox": bbox}
                out.append(entry | {"score": float(found.score)})
    return out
