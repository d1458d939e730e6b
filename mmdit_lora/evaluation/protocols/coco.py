"""COCO layouts: AP and AR of a detector on the generated images against the layout's boxes, by pycocotools.

Which images and boxes: the filter of CreatiLayout for COCO 2017, as its author and a user who got the paper's counts state it
(github.com/HuiZhang0812/CreatiLayout, issue 9):

    1. no image with a crowd (`iscrowd`), none with more than 3 persons (counted before the next step)
    2. boxes of less than 2 % of the image's area are left out
    3. images with 2 to 10 boxes remain (the paper: 61,002 of train, 2,565 of val)

AP, AR: COCO's own definitions (cocodataset.org, "Detection Evaluation"; pycocotools.cocoeval), on the boxes that remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.coco import Instances, annotation_box, read_instances
from mmdit_lora.data.formats.common import Context, four, need_text, number
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.metrics import COCO_METRICS, coco_metrics
from mmdit_lora.evaluation.protocols.base import (
    Case,
    Observation,
    PublishedProtocol,
    Region,
    image_size,
)
from mmdit_lora.files import write_json

MIN_AREA = 0.02  # of the image's
BOXES = (2, 10)
MAX_PERSONS = 3
_MEANINGS = (
    "average precision, mean over IoU 0.50 to 0.95 and over categories",
    "at IoU 0.50",
    "at IoU 0.75",
    "of things below 32 x 32 pixels",
    "of things up to 96 x 96 pixels",
    "of larger ones",
    "average recall with one detection an image",
    "with ten",
    "with a hundred",
)


class CocoLayout(PublishedProtocol):
    """`annotations/instances_*.json` with `captions_*.json` beside it. Detectors label objects with COCO's names.

    A case's caption is the image's first; without captions, one is made of the phrases.
    """

    name = "coco"
    title = "COCO layout"
    source = "pycocotools.cocoeval; the filter: github.com/HuiZhang0812/CreatiLayout issue 9, arXiv 2412.03859"
    metrics = dict(zip(COCO_METRICS, _MEANINGS, strict=True))  # noqa: RUF012
    deviations = (
        "things that were left out by the filter are no ground truth: a detector that finds them is charged",
        "published figures differ in detector and selection of images; each row says which, where it is known",
    )

    def _cases(self, path: Path) -> Iterator[Case]:
        path = _instances_file(path)
        said = read_instances(path)
        for _, location in said.strays:
            raise InputError("its image_id is that of no image", location=location)
        for image, location, own in said.images:
            if (case := _case(image, location, own, said, path)) is not None:
                yield case

    def _score(self, pairs: Sequence[tuple[Case, Observation]]) -> dict[str, float]:
        truth = _truth([case for case, _ in pairs])
        return coco_metrics(truth["images"], truth["categories"], truth["annotations"], _results(pairs))

    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """The detections in COCO's result format, and the filtered ground truth that they are scored against."""
        split = cases[0].extra["split"]
        names = f"detections_{split}_mmdit_lora_results.json", f"instances_{split}_filtered.json"
        files = [Path(out) / name for name in names]
        write_json(files[0], _results(list(zip(cases, observations, strict=True))))
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
    """The image's case; None if the filter leaves it out."""
    (width, height), file = image_size(image, location), need_text(image, "file_name", location)
    if any(annotation.get("iscrowd") for annotation, _ in own):
        return None
    regions: list[Region] = []
    truth: list[dict[str, Any]] = []
    persons = 0
    for annotation, place in own:
        category = said.category(annotation, place)
        name = said.names[category]
        persons += name.lower() == "person"
        bbox = four(annotation_box(annotation, (width, height), place), place)
        Context(path).box(bbox, "xywh", place, unit="pixel", size=(width, height), around=True)  # for its checks
        left, top, across, down = bbox
        if across * down < MIN_AREA * width * height:
            continue
        xyxy = (left / width, top / height, (left + across) / width, (top + down) / height)
        regions.append(Region(xyxy, name, name.lower(), key=str(len(regions))))
        area = annotation.get("area")
        area = across * down if area is None else number(area, place)
        truth.append({"id": annotation.get("id", 0), "category_id": category, "bbox": [*bbox], "area": area})
    if persons > MAX_PERSONS or not BOXES[0] <= len(regions) <= BOXES[1]:
        return None
    phrases = ", ".join(dict.fromkeys(region.phrase for region in regions))
    caption = said.captions.get(image["id"], f"a photo of {phrases}")
    extra = {"image_id": image["id"], "file_name": file, "truth": truth, "categories": said.names}
    extra["split"] = path.stem.removeprefix("instances_")
    id_, keys = str(image["id"]), (Path(file).stem,)
    return Case(id_, caption, (width, height), tuple(regions), (file,), keys, location, extra)


def _truth(cases: Sequence[Case]) -> dict[str, Any]:
    """The filtered ground truth in COCO's structure. Annotations are numbered anew: pycocotools takes an id of 0 for none."""
    entries = [entry | {"image_id": case.extra["image_id"]} for case in cases for entry in case.extra["truth"]]
    return {
        "images": [
            {"id": c.extra["image_id"], "file_name": c.extra["file_name"], "width": c.size[0], "height": c.size[1]}
            for c in cases
        ],
        "annotations": [entry | {"id": number, "iscrowd": 0} for number, entry in enumerate(entries, start=1)],
        "categories": [{"id": number, "name": name} for number, name in cases[0].extra["categories"].items()],
    }


def _results(pairs: Sequence[tuple[Case, Observation]]) -> list[dict[str, Any]]:
    """COCO's result format: image_id, category_id, bbox (xywh in pixels of the stated size), score.

    Detections whose label is no category's name are left out.
    """
    out = []
    for case, seen in pairs:
        ids = {name.strip().lower(): number for number, name in case.extra["categories"].items()}
        width, height = case.size
        for found in seen.detections or ():
            if (category := ids.get(found.label.strip().lower())) is not None:
                x0, y0, x1, y1 = (float(v) for v in found.xyxy)
                bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
                entry = {"image_id": case.extra["image_id"], "category_id": category, "bbox": bbox}
                out.append(entry | {"score": float(found.score)})
    return out
