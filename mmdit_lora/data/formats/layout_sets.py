"""The field's own sets: LayoutSAM and its eval, DenseLayout, SACap, OverLayBench, COCO-MIG. Boxes are xyxy in pixels if not said.

What a file says is read apart from its images (`*_boxes`, `*_prompts`): the published protocols read the same files, and
their images are those that a model painted (`evaluate/protocols`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.coco import rle_box
from mmdit_lora.data.formats.common import (
    XYXY,
    Context,
    MissingImageError,
    Reads,
    Sample,
    is_file,
    items_of,
    key_of,
    need,
    read_yaml,
    size_of,
    spoken,
    stated_size,
    text,
)
from mmdit_lora.data.formats.tables import each, rows, table_files
from mmdit_lora.errors import InputError, shown
from mmdit_lora.json_files import parse_json, read_json

_TABLES = (".parquet", ".jsonl", ".json")
OVERLAY_SIDE = 1024  # of the square that OverLayBench's boxes lie on


@dataclass(frozen=True)
class SaidBox:
    """A box as a file says it: its place in the file, its four numbers in the set's own unit, its two texts as they are."""

    location: str
    value: Any
    short: Any
    long: Any

    def spoken(self, detailed: bool) -> str:
        """The text that is wanted, else the other. Raises `InputError` where both are missing."""
        return spoken(self.short, self.long, detailed, self.location)


def read_layout_sam(context: Context) -> Reads:
    """LayoutSAM train (parquet without images): `image_path`, `metadata` {global_caption, image_info, bbox_info}.

    The phrase is `description`, or with `detailed` `detail_description`. Images are SA-1B's, below `--images`.
    """
    return each(rows(table_files(context, *_TABLES)), partial(_layout_sam, context=context))


def _layout_sam(row: Any, location: str, context: Context) -> Sample:
    metadata = _unpacked(need(row, "metadata", location), f"{location}: metadata")
    info = need(metadata, "image_info", location)
    name = row.get("image_path") or need(info, "file_name", location)
    image = context.image_finder.find(text(name, "image_path", location), location)
    size = stated_size(image, (need(info, "width", location), need(info, "height", location)), location)
    things: list[tuple[str, XYXY]] = []
    for index, entry in enumerate(items_of(metadata, "bbox_info", location)):
        place = f"{location}: bbox_info[{index}]"
        box = context.box(need(entry, "bbox", place), "xyxy", place, unit="pixel", size=size)
        phrase = spoken(entry.get("description"), entry.get("detail_description"), context.detailed, place)
        _add(things, phrase, box)
    return Sample(image, location, things, text(need(metadata, "global_caption", location), "global_caption", location))


def read_layout_sam_eval(context: Context) -> Reads:
    """LayoutSAM-eval (parquet with images): `bbox_list`, `region_captions`, `detail_region_captions` as Python literals."""
    return each(rows(table_files(context, *_TABLES)), partial(_layout_sam_eval, context=context))


def _layout_sam_eval(row: Any, location: str, context: Context) -> Sample:
    said = layout_sam_eval_boxes(row, location)
    image = _image(row, str(row.get("image_id", "")), location, context)
    size = stated_size(image, (need(row, "width", location), need(row, "height", location)), location)
    things = _things(said, context, size)
    return Sample(image, location, things, text(need(row, "global_caption", location), "global_caption", location))


def layout_sam_eval_boxes(row: Any, location: str) -> list[SaidBox]:
    """The boxes of a row, in pixels of its `width` x `height`; short: region caption, long: detailed one."""
    boxes, short = (_literal(row, key, location) for key in ("bbox_list", "region_captions"))
    long = _literal(row, "detail_region_captions", location) if row.get("detail_region_captions") else short
    if not len(boxes) == len(short) == len(long):
        raise InputError(f"{len(boxes)} boxes, {len(short)} captions and {len(long)} detailed ones", location=location)
    return [
        SaidBox(f"{location}: bbox_list[{index}]", *each_of)
        for index, each_of in enumerate(zip(boxes, short, long, strict=True))
    ]


def read_dense_layout(context: Context) -> Reads:
    """DenseLayout: `id`, `prompt`, `width`, `height`, `annos` [{bbox, category_name, caption}].

    The phrase is `category_name`, or with `detailed` `caption`. Without an `image` column the images are `<id>.jpg` below
    `--images`.
    """
    return each(rows(table_files(context, *_TABLES)), partial(_dense_layout, context=context))


def _dense_layout(row: Any, location: str, context: Context) -> Sample:
    image = _image(row, str(need(row, "id", location)), location, context)
    size = stated_size(image, (need(row, "width", location), need(row, "height", location)), location)
    things = _things(dense_layout_boxes(row, location), context, size)
    return Sample(image, location, things, text(need(row, "prompt", location), "prompt", location))


def dense_layout_boxes(row: Any, location: str) -> list[SaidBox]:
    """The boxes of a row, in pixels of its `width` x `height`; short: `category_name`, long: `caption`."""
    said = []
    for index, entry in enumerate(_unpacked(need(row, "annos", location), f"{location}: annos", list)):
        place = f"{location}: annos[{index}]"
        said.append(SaidBox(place, need(entry, "bbox", place), entry.get("category_name"), entry.get("caption")))
    return said


def read_sacap(context: Context) -> Reads:
    """SACap-1M and its eval: `imagename`, `image_group`, `caption`, `segments_info` [{anno_id, caption, short_caption}].

    Boxes are those of SA-1B's `<image>.json` beside the image, below `--images`: xywh in pixels, or around the mask.
    """
    return each(rows(table_files(context, ".parquet", ".jsonl")), partial(_sacap, context=context))


def _sacap(row: Any, location: str, context: Context) -> Sample:
    name = text(need(row, "imagename", location), "imagename", location)
    image = context.image_finder.find(f"{row.get('image_group', '')}/{name}", location)
    beside = image.with_suffix(".json")
    if not beside.is_file():
        raise InputError(
            f"has no {beside.name} beside its image", location=location, hint="SA-1B's own json holds the boxes"
        )
    data = read_json(beside)
    about = need(data, "image", str(beside))
    size = stated_size(image, (need(about, "width", str(beside)), need(about, "height", str(beside))), str(beside))
    segments = {key_of(a, "id", str(beside)): a for a in items_of(data, "annotations", str(beside))}
    things: list[tuple[str, XYXY]] = []
    for index, entry in enumerate(items_of(row, "segments_info", location)):
        place = f"{location}: segments_info[{index}]"
        key = key_of(entry, "anno_id", place)
        if key not in segments:
            raise InputError(f"anno_id {shown(key)} is not in {beside.name}", location=place)
        found = segments[key]
        xywh = found.get("bbox") or rle_box(need(found, "segmentation", str(beside)), size, f"{beside}: {key}")
        box = context.box(xywh, "xywh", place, unit="pixel", size=size)
        _add(things, spoken(entry.get("short_caption"), entry.get("caption"), context.detailed, place), box)
    return Sample(image, location, things, text(need(row, "caption", location), "caption", location))


def read_overlay_bench(context: Context) -> Reads:
    """OverLayBench and its eval: `image_id`, `annotation` {caption, annotations: {name: {category, bbox, local_prompts}}}.

    The annotation is the text of a Python literal, as the set's own evaluation reads it (github.com/mlpc-ucsd/OverLayBench,
    8f73c1d, overlaybenchpytools): boxes are xyxy on a square of 1024 pixels, whatever the image's own side. The phrase is
    `category`, or with `detailed` `local_prompts`. Without an `image` column the images are `<image_id>.*` below `--images`.
    """
    return each(rows(table_files(context, ".parquet", ".jsonl")), partial(_overlay_bench, context=context))


def _overlay_bench(row: Any, location: str, context: Context) -> Sample:
    annotation = overlay_bench_annotation(row, location)
    image = _image(row, str(row.get("image_id", "")), location, context)
    width, height = size_of(image, location)
    if width != height:
        raise InputError(
            f"its image has {width} x {height} pixels, and OverLayBench's boxes lie on a square", location=location
        )
    things = _things(overlay_bench_boxes(annotation, location).values(), context, (OVERLAY_SIDE, OVERLAY_SIDE))
    return Sample(image, location, things, text(need(annotation, "caption", location), "caption", location))


def overlay_bench_annotation(row: Any, location: str) -> Mapping[str, Any]:
    """What a row's `annotation` says. Raises `InputError` where it is no object."""
    annotation = _evaluated(need(row, "annotation", location), f"{location}: annotation")
    if not isinstance(annotation, Mapping):
        raise InputError(f"annotation is {type(annotation).__name__}, not an object", location=location)
    return annotation


def overlay_bench_boxes(annotation: Mapping[str, Any], location: str) -> dict[str, SaidBox]:
    """Name -> box on a square of `OVERLAY_SIDE` pixels, in the file's order; short: `category`, long: `local_prompts`."""
    entries = need(annotation, "annotations", f"{location}: annotation")
    if not isinstance(entries, Mapping):
        raise InputError(f"annotations is {type(entries).__name__}, not an object", location=location)
    said = {}
    for name, entry in entries.items():
        place = f"{location}: annotations[{shown(name)}]"
        said[str(name)] = SaidBox(place, need(entry, "bbox", place), entry.get("category"), entry.get("local_prompts"))
    return said


def read_coco_mig(context: Context) -> Reads:
    """COCO-MIG: mig_bench_anno.yaml, prompt -> {phrase: [[x0, y0, x1, y1], ...], coco_id}; xyxy relative.

    The set has no images: those of COCO val 2014 or 2017 whose id is `coco_id` are looked for below `--images`.

    Raises:
        InputError: no such yaml, or no `--images`. A record: another structure, no image of that id.
    """
    src = context.src
    path = src if src.is_file() else src / "mig_bench_anno.yaml"
    if not is_file(path):
        raise InputError("has no mig_bench_anno.yaml", location=str(src))
    if context.images is None:
        raise InputError(
            "COCO-MIG has layouts and no images", location=str(path), hint="give COCO's images with --images DIR"
        )
    for prompt, entry, location in coco_mig_prompts(path):
        yield partial(_coco_mig, prompt, entry, location, context)


def coco_mig_prompts(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(prompt, its entry, where) of a mig_bench_anno.yaml. Raises `InputError` where it is no YAML of prompts."""
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise InputError(f"holds {type(data).__name__}, not prompts", location=str(path))
    for index, (prompt, entry) in enumerate(data.items()):
        yield prompt, entry, f"{path}: prompt {index}"


def coco_mig_boxes(entry: Any, location: str) -> list[SaidBox]:
    """The boxes of a prompt's entry, relative; short: the phrase, e.g. "a red car"."""
    said = []
    for phrase in entry:
        if phrase == "coco_id":
            continue
        for index, value in enumerate(items_of(entry, phrase, location)):
            said.append(SaidBox(f"{location}: {phrase}[{index}]", value, text(phrase, "the phrase", location), None))
    return said


def _coco_mig(prompt: Any, entry: Any, location: str, context: Context) -> Sample:
    key = str(need(entry, "coco_id", location)).rjust(12, "0")
    try:
        image = context.image_finder.find(f"COCO_val2014_{key}.jpg", location)
    except MissingImageError:
        image = context.image_finder.find(f"{key}.jpg", location)
    things: list[tuple[str, XYXY]] = []
    for said in coco_mig_boxes(entry, location):
        _add(things, said.short, context.box(said.value, "xyxy", said.location, image=image))
    return Sample(image, location, things, text(prompt, "the prompt", location))


def _things(said: Iterable[SaidBox], context: Context, size: tuple[int, int]) -> list[tuple[str, XYXY]]:
    """Texts and boxes of what a file says in pixels of `size`; those without area are left out."""
    things: list[tuple[str, XYXY]] = []
    for one in said:
        box = context.box(one.value, "xyxy", one.location, unit="pixel", size=size)
        _add(things, one.spoken(context.detailed), box)
    return things


def _add(things: list[tuple[str, XYXY]], phrase: str, box: XYXY | None) -> None:
    if box is not None:
        things.append((phrase, box))


def _image(row: Any, stem: str, location: str, context: Context) -> Path:
    """The image in the row's `image` column, else the file that it names, else the one of that stem."""
    image = row.get("image")
    if isinstance(image, bytes | Mapping):
        return context.unpacked(image, f"{stem or location}", location)
    name = image if isinstance(image, str) else row.get("file_name") or stem
    return context.image_finder.find(text(name, "the image's name", location), location)


def _unpacked(value: Any, location: str, kind: type = Mapping) -> Any:
    """An object, or the one that a JSON text holds."""
    if isinstance(value, str):
        value = parse_json(value, location=location)
    if not isinstance(value, kind):
        raise InputError(f"is {type(value).__name__}", location=location)
    return value


def _literal(row: Any, key: str, location: str) -> list[Any]:
    """The list that a column holds, as such or as the text of a Python literal."""
    value = _evaluated(need(row, key, location), f"{location}: {key}")
    if not isinstance(value, list | tuple):
        raise InputError(f"{key} is {type(value).__name__}, not a list", location=location)
    return list(value)


def _evaluated(value: Any, location: str) -> Any:
    """A value as it is, or what the text of a Python literal says; nothing is executed."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"is no Python literal ({shown(value)})", location=location) from None
