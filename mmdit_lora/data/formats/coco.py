"""COCO: annotations/instances_*.json, captions_*.json, and images in folders. Boxes are xywh in pixels, counted from 0.

Source of the format: the COCO site's "Data format" page; `iscrowd` annotations cover many objects and are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mmdit_lora.boxes import Four
from mmdit_lora.data.formats.common import (
    Context,
    ImageFinder,
    RawBox,
    Reads,
    Sample,
    items_of,
    key_of,
    need,
    need_text,
    number,
    points_box,
    put_image,
    size_of,
)
from mmdit_lora.data.formats.tables import import_or_explain
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.files import json_text
from mmdit_lora.json_files import read_json

Placed = list[tuple[Any, str]]  # (entry, its place in the file)


def read_coco(context: Context) -> Reads:
    """Records of a COCO folder, or of one instances file.

    The caption is the first of an image's in captions_*.json; without such a file there is none. Boxes come from `bbox`,
    else from `segmentation` (polygons; RLE with pycocotools).

    Raises:
        InputError: no instances file; a file is no JSON, or not of COCO's structure.
    """
    for path in _instance_files(context):
        instances = read_instances(path)
        finder = ImageFinder(*_roots(context, path))
        for image, location, own in instances.images:
            yield partial(_sample, image, location, own, instances, finder, context)
        for annotation, location in instances.strays:
            yield partial(_stray, annotation, location, len(instances.images))


class Instances(NamedTuple):
    """What an instances file and the captions beside it say.

    Args:
        images: (image, place, its (annotation, place) in the file's order).
        names: id -> name of a category. captions: id of an image -> its first caption.
        strays: of the annotations of images that are not there, the first of each.
    """

    images: list[tuple[Any, str, Placed]]
    names: dict[Any, str]
    captions: dict[Any, str]
    strays: Placed

    def category(self, annotation: Any, location: str) -> int | str:
        """The annotation's category id. Raises `InputError` where no category has it."""
        category = need(annotation, "category_id", location)
        if not isinstance(category, int | str) or category not in self.names:
            raise InputError(f"category_id is {shown(category)}, which no category has", location=location)
        return category


def read_instances(path: Path) -> Instances:
    """Read an instances file. Raises `InputError` where it is no JSON, or not of COCO's structure."""
    data = read_json(path)
    images, annotations, categories = (_placed(data, path, key) for key in ("images", "annotations", "categories"))
    names = {key_of(category, "id", place): need_text(category, "name", place) for category, place in categories}
    ids = [key_of(image, "id", place) for image, place in images]
    by_image: defaultdict[Any, Placed] = defaultdict(list)
    for annotation, place in annotations:
        image_id = annotation.get("image_id") if isinstance(annotation, Mapping) else None
        by_image[image_id if isinstance(image_id, int | str) else None].append((annotation, place))
    placed = [(image, place, by_image.pop(key, [])) for key, (image, place) in zip(ids, images, strict=True)]
    captions: dict[Any, str] = {}
    file = path.with_name(path.name.replace("instances_", "captions_"))
    if file != path and file.exists():
        for item, place in _placed(read_json(file), file, "annotations"):
            captions.setdefault(key_of(item, "image_id", place), need_text(item, "caption", place))
    return Instances(placed, names, captions, [strays[0] for strays in by_image.values()])


def annotation_box(annotation: Any, size: tuple[int, int], location: str) -> Any:
    """xywh in pixels: the annotation's `bbox`, else around its `segmentation` (polygons [[x, y, x, y, ...], ...] or an RLE).

    Args:
        size: (width, height) of its image in pixels.

    Raises:
        InputError: it has neither, or a wrong segmentation.
    """
    if box := annotation.get("bbox"):
        return box
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping):
        return rle_box(segmentation, size, location)
    polygons = segmentation if isinstance(segmentation, list) else []
    if not polygons or not all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in polygons):
        raise InputError("has neither bbox nor segmentation", location=location)
    numbers = [[number(v, location) for v in polygon] for polygon in polygons]
    points = [point for polygon in numbers for point in zip(polygon[::2], polygon[1::2], strict=False)]
    left, top, right, bottom = points_box(points)
    return left, top, right - left, bottom - top


def write_coco(folder: Path, items: Iterable[Item]) -> None:
    """Write images/, annotations/instances_all.json and captions_all.json. Boxes are floats: nothing is rounded."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    for index, (name, image, layout) in enumerate(items, start=1):
        width, height = put_image(image, folder / "images" / name)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        captions.append({"id": index, "image_id": index, "caption": layout.caption})
        for box in layout.boxes:
            across, down = box.width * width, box.height * height
            category = categories.setdefault(box.phrase, len(categories) + 1)
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": category}
            bbox = [box.xyxy[0] * width, box.xyxy[1] * height, across, down]
            annotations.append(annotation | {"bbox": bbox, "area": across * down, "iscrowd": 0})
    kinds = [{"id": number, "name": name} for name, number in categories.items()]
    (folder / "annotations").mkdir()
    for stem, data in (
        ("instances_all", {"images": images, "annotations": annotations, "categories": kinds}),
        ("captions_all", {"images": images, "annotations": captions}),
    ):
        (folder / "annotations" / f"{stem}.json").write_text(json_text(data), encoding="utf-8")


def _instance_files(context: Context) -> list[Path]:
    src, split = context.src, context.split
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise InputError("no such folder or file", location=str(src), hint="give a COCO folder, or an instances_*.json")
    splits = {p.stem.removeprefix("instances_"): p for p in sorted((src / "annotations").glob("instances_*.json"))}
    # The others are what Roboflow exports.
    splits = splits or {path.parent.name: path for path in sorted(src.glob("*/_annotations.coco.json"))}
    splits = splits or {path.stem: path for path in sorted(src.glob("*.coco.json"))}
    if not splits:
        hint = "give the annotation file itself, and --images"
        raise InputError("holds no annotations/instances_*.json", location=str(src), hint=hint)
    if split is None:
        if len(splits) > 1:
            context.remarks.append(f"all splits were read; --split takes {', '.join(splits)}")
        return list(splits.values())
    if split not in splits:
        raise unknown_key(split, splits, location="--split")
    return [splits[split]]


def _roots(context: Context, path: Path) -> list[Path]:
    """Where the images of an instances file may lie, the likeliest first."""
    if context.images:
        return [context.images]
    split = path.stem.removeprefix("instances_")
    base = path.parent.parent if path.parent.name == "annotations" else path.parent
    near = [base / "images" / split, base / split, base / "images"]
    return [folder for folder in near if folder.is_dir()] or [base]


def _placed(data: Any, path: Path, key: str) -> Placed:
    return [(item, f"{path}: {key}[{index}]") for index, item in enumerate(items_of(data, key, str(path)))]


def _stray(annotation: Any, location: str, known: int) -> Sample:
    found = need(annotation, "image_id", location)
    raise InputError(f"image_id is {shown(found)}, and none of the {known} images has that id", location=location)


def _sample(
    image: Any, location: str, annotations: Placed, instances: Instances, finder: ImageFinder, context: Context
) -> Sample:
    file = finder.find(need_text(image, "file_name", location), location)
    size = size_of(file, location, (image.get("width"), image.get("height")))

    def boxes() -> Iterator[RawBox]:
        for annotation, place in annotations:
            if annotation.get("iscrowd"):
                context.leave_out("crowds")
                continue
            name = instances.names[instances.category(annotation, place)]
            yield RawBox(place, annotation_box(annotation, size, place), name)

    things = context.things(boxes(), "xywh", unit="pixel", size=size)
    return Sample(file, location, things, instances.captions.get(image["id"]))


def rle_box(rle: Any, size: tuple[int, int], location: str) -> Four:
    """xywh in pixels around a mask in COCO's run lengths, compressed or not.

    Args:
        size: (width, height) of its image in pixels.

    Raises:
        InputError: it is no such mask, of another size, or pycocotools is not installed.
    """
    stated = need(rle, "size", location)
    if stated != [size[1], size[0]] or any(isinstance(side, bool) for side in stated):
        what = f"the size of its mask is {shown(stated)}, and the image has {size[1]} x {size[0]} (height, width)"
        raise InputError(what, location=location, hint="make the mask of the image's size")
    counts, pixels = need(rle, "counts", location), size[0] * size[1]
    if isinstance(counts, list):
        valid = all(type(run) is int and 0 <= run <= pixels for run in counts)
        if not valid or sum(counts) != pixels:
            hint = f"give whole numbers, 0 or more, whose sum is height x width, {pixels:,}"
            raise InputError(f"the runs of its mask are {shown(counts)}", location=location, hint=hint)
    mask = import_or_explain("pycocotools.mask", location)
    try:
        packed = mask.frPyObjects(dict(rle), size[1], size[0]) if isinstance(counts, list) else dict(rle)
        mask.decode(packed)  # refuses runs that leave the image
        left, top, across, down = (float(v) for v in mask.toBbox(packed))
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"its segmentation is no RLE ({error})", location=location) from None
    return left, top, across, down
