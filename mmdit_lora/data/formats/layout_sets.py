"""Published sets of layouts and grounded captions: LayoutSAM and its eval, DenseLayout, SACap, OverLayBench, COCO-MIG, GRIT,
HiCo, GLIGEN, InstanceDiffusion, EliGen.

What a file states is read apart from its images (`*_boxes`, `*_prompts`): the published protocols read the same files, and
their images are those that a model generated (`evaluation/protocols`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from mmdit_lora.data.formats.coco import rle_box
from mmdit_lora.data.formats.common import (
    Context,
    ImageFinder,
    MissingImageError,
    RawBox,
    Reads,
    Sample,
    is_file,
    items_of,
    key_of,
    need,
    need_text,
    number,
    read_text,
    read_yaml,
    size_of,
    stated_size,
    text,
)
from mmdit_lora.data.formats.tables import Table, columns, each, rows, table_files
from mmdit_lora.data.images import load_image
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import inside
from mmdit_lora.json_files import parse_json, read_json

OVERLAY_SIDE = 1024  # of the square that OverLayBench's boxes lie on
_HICO = ("base_info", "caption", "obj_nums", "img_size", "path_img", "list_bbox_info")


def _layout_sam_row(row: Any, location: str, _: Context) -> Any:
    metadata = _unpacked(need(row, "metadata", location), f"{location}: metadata")
    info = need(metadata, "image_info", location)
    width, height = need(info, "width", location), need(info, "height", location)
    name = row.get("image_path") or need(info, "file_name", location)
    return {**metadata, "file_name": name, "width": width, "height": height}


def layout_sam_eval_boxes(row: Any, location: str, _: Context | None = None) -> list[RawBox]:
    """The boxes of a row, in pixels of its `width` x `height`; short: region caption, long: detailed one."""
    boxes, short = (_literal(row, key, location) for key in ("bbox_list", "region_captions"))
    long = _literal(row, "detail_region_captions", location) if row.get("detail_region_captions") else short
    if not len(boxes) == len(short) == len(long):
        raise InputError(f"{len(boxes)} boxes, {len(short)} captions and {len(long)} detailed ones", location=location)
    triples = enumerate(zip(boxes, short, long, strict=True))
    return [RawBox(f"{location}: bbox_list[{index}]", *triple) for index, triple in triples]


def dense_layout_boxes(row: Any, location: str, _: Context | None = None) -> list[RawBox]:
    """The boxes of a row, in pixels of its `width` x `height`; short: `category_name`, long: `caption`."""
    return list(columns("annos", "category_name", "caption")(row, location, Context(Path())))


def _grit_boxes(row: Any, location: str, context: Context) -> Iterator[RawBox]:
    column = "ref_exps" if context.detailed else "noun_chunks"
    for index, chunk in enumerate(items_of(row, column, location)):
        place = f"{location}: {column}[{index}]"
        if not isinstance(chunk, list) or len(chunk) not in (6, 7):
            raise InputError(
                f"is {shown(chunk)}", location=place, hint="a chunk is [start, end, x0, y0, x1, y1, score]"
            )
        yield RawBox(place, chunk[2:6], _span(row["caption"], chunk[0], chunk[1], place))


def _hico_row(row: Any, location: str, _: Context) -> Any:
    size = need(row, "img_size", location)
    width, height = need(size, "W", location), need(size, "H", location)
    return {**row, "file_name": need_text(row, "path_img", location), "width": width, "height": height}


def _hico_boxes(row: Any, location: str, _: Context) -> Iterator[RawBox]:
    for index, entry in enumerate(items_of(row, "list_bbox_info", location)):
        place = f"{location}: list_bbox_info[{index}]"
        if not isinstance(entry, list) or len(entry) not in (2, 5):
            raise InputError(f"is {shown(entry)}", location=place, hint="write [text, [x0, y0, x1, y1]]")
        yield RawBox(place, entry[1] if len(entry) == 2 else entry[1:], entry[0])


def _gligen_row(row: Any, location: str, _: Context) -> Any:
    data = parse_json(need(row, "json", location), location=location)
    need_text(data, "image", location)
    return {"data_id": row["key"], **data}


def _gligen_boxes(row: Any, location: str, _: Context) -> Iterator[RawBox]:
    for index, anno in enumerate(items_of(row, "annos", location)):
        place = f"{location}: annos[{index}]"
        spans = need(anno, "tokens_positive", place)
        spans = [spans] if isinstance(spans, list) and spans and not isinstance(spans[0], list) else spans
        if not isinstance(spans, list) or not spans or not all(isinstance(s, list) and len(s) == 2 for s in spans):
            raise InputError(f"tokens_positive is {shown(spans)}", location=place, hint="write [[start, end], ...]")
        phrase = " ".join(_span(row["caption"], start, end, place) for start, end in spans)
        yield RawBox(place, need(anno, "bbox", place), phrase)


# LayoutSAM train (parquet without images): `image_path`, `metadata` {global_caption, image_info, bbox_info}; SA-1B's images.
read_layout_sam = Table(
    columns("bbox_info", "description", "detail_description"), "global_caption", prepare=_layout_sam_row
)
# LayoutSAM-eval (parquet with images): `bbox_list`, `region_captions`, `detail_region_captions` as Python literals.
read_layout_sam_eval = Table(layout_sam_eval_boxes, "global_caption", stem="image_id")
# DenseLayout: `id`, `prompt`, `width`, `height`, `annos` [{bbox, category_name, caption}].
read_dense_layout = Table(dense_layout_boxes, "prompt", stem="id")
# GRIT (parquet, or the json files that img2dataset writes): `noun_chunks` or `ref_exps` [[start, end, x0, y0, x1, y1, score]];
# the phrase is `caption[start:end]`. Images are `<key>.jpg`.
read_grit = Table(
    _grit_boxes,
    unit="relative",
    prepare=lambda row, location, _: {**row, "file_name": str(row.get("key") or need(row, "id", location))},
)
# GLIGEN's TSV: a key and a JSON object a line: {image (base64), file_name, caption, annos [{bbox, tokens_positive}]}. `bbox` is
# xywh: GLIGEN's notes say x, y, h, w, its code reads x, y, w, h. Embeddings, which are stored beside, are not read.
read_gligen = Table(
    _gligen_boxes,
    order="xywh",
    prepare=_gligen_row,
    stem="data_id",
    size=None,
    suffixes=(".tsv",),
    header=["key", "json"],
    base64=True,
)
# HiCo: objects of the keys `_HICO`; `list_bbox_info` holds [text, [x0, y0, x1, y1]] or [text, x0, y0, x1, y1].
_hico = Table(_hico_boxes, prepare=_hico_row)
_instances = Table(
    columns("annos", "category_name", "caption"), order="xywh", stem="stem", suffixes=(".json",), base64=True
)


def read_hico(context: Context) -> Reads:
    """HiCo json: objects, or lists [base_info, caption, obj_nums, img_size, path_img, list_bbox_info, ...]."""

    def as_object(row: Any) -> Any:
        return dict(zip(_HICO, row, strict=False)) if isinstance(row, list) and len(row) >= len(_HICO) else row

    table = rows(table_files(context, ".json", ".jsonl"))
    return each(((location, as_object(row)) for location, row in table), partial(_hico.sample, context=context))


def read_instance_diffusion(context: Context) -> Reads:
    """InstanceDiffusion: json files (or a .txt that lists them): {caption, width, height, image (base64), annos}.

    An entry of `annos` has `bbox` (xywh in pixels), `category_name` and `caption` (taken with `detailed`). Without `image`,
    as in the inference json, the image has the json's stem or `file_name`, below `--images`.
    """
    src = context.src
    if src.suffix == ".txt" and src.is_file():
        for line_number, line in enumerate(read_text(src).splitlines(), start=1):
            if name := line.strip():
                yield partial(_listed_instances, name, f"{src}:{line_number}", context)
        return
    for path in table_files(context, *_instances.suffixes):
        yield partial(_instances_of, path, context)


def _listed_instances(name: str, location: str, context: Context) -> Sample:
    folder = context.src.parent
    # Lists often hold paths of another machine: then the file of that name beside the list is meant.
    candidates = [folder / PureWindowsPath(name).name]
    with suppress(InputError):
        candidates.insert(0, inside(folder, name, location=location))
    path = next((candidate for candidate in candidates if is_file(candidate)), None)
    if path is None:
        raise InputError(f"names {name!r}, which does not exist", location=location)
    return _instances_of(path, context)


def _instances_of(path: Path, context: Context) -> Sample:
    data = read_json(path)
    need(data, "caption", str(path))
    return _instances.sample({"stem": path.stem, **data}, str(path), context)


def read_sacap(context: Context) -> Reads:
    """SACap-1M and its eval: `imagename`, `image_group`, `caption`, `segments_info` [{anno_id, caption, short_caption}].

    Boxes are those of SA-1B's `<image>.json` beside the image, below `--images`: xywh in pixels, or around the mask.
    """
    return each(rows(table_files(context, ".parquet", ".jsonl")), partial(_sacap, context=context))


def _sacap(row: Any, location: str, context: Context) -> Sample:
    name = f"{row.get('image_group', '')}/{need_text(row, 'imagename', location)}"
    image = context.image_finder.find(name, location)
    beside = image.with_suffix(".json")
    if not beside.is_file():
        what = f"has no {beside.name} beside its image"
        raise InputError(what, location=location, hint="SA-1B's own json holds the boxes")
    data, file = read_json(beside), str(beside)
    about = need(data, "image", file)
    size = stated_size(image, (need(about, "width", file), need(about, "height", file)), file)
    segments = {key_of(segment, "id", file): segment for segment in items_of(data, "annotations", file)}

    def boxes() -> Iterator[RawBox]:
        for index, entry in enumerate(items_of(row, "segments_info", location)):
            place = f"{location}: segments_info[{index}]"
            key = key_of(entry, "anno_id", place)
            if key not in segments:
                raise InputError(f"anno_id {shown(key)} is not in {beside.name}", location=place)
            segment = segments[key]
            xywh = segment.get("bbox") or rle_box(need(segment, "segmentation", file), size, f"{beside}: {key}")
            yield RawBox(place, xywh, entry.get("short_caption"), entry.get("caption"))

    things = context.things(boxes(), "xywh", unit="pixel", size=size)
    return Sample(image, location, things, need_text(row, "caption", location))


def _overlay_row(row: Any, location: str, _: Context) -> Any:
    annotation = overlay_bench_annotation(row, location)
    return {**row, "annotation": annotation, "caption": annotation.get("caption"), "side": OVERLAY_SIDE}


def _overlay_boxes(row: Any, location: str, _: Context) -> Iterator[RawBox]:
    yield from overlay_bench_boxes(row["annotation"], location).values()


# OverLayBench and its eval: `image_id`, `annotation` {caption, annotations: {name: {category, bbox, local_prompts}}}. The
# annotation is the text of a Python literal, as the set's own evaluation reads it (github.com/mlpc-ucsd/OverLayBench, 8f73c1d,
# overlaybenchpytools): boxes are xyxy on a square of 1024 pixels, whatever the image's own side.
_overlay = Table(
    _overlay_boxes, prepare=_overlay_row, stem="image_id", size=("side", "side"), suffixes=(".parquet", ".jsonl")
)


def read_overlay_bench(context: Context) -> Reads:
    """OverLayBench: the phrase is `category`, or with `detailed` `local_prompts`."""
    return each(rows(table_files(context, *_overlay.suffixes)), partial(_overlay_sample, context=context))


def _overlay_sample(row: Any, location: str, context: Context) -> Sample:
    sample = _overlay.sample(row, location, context)
    width, height = size_of(sample.image, location)
    if width != height:
        what = f"its image has {width} x {height} pixels, and OverLayBench's boxes lie on a square"
        raise InputError(what, location=location)
    return sample


def overlay_bench_annotation(row: Any, location: str) -> Mapping[str, Any]:
    """What a row's `annotation` says. Raises `InputError` where it is no object."""
    annotation = _evaluated(need(row, "annotation", location), f"{location}: annotation")
    if not isinstance(annotation, Mapping):
        raise InputError(f"annotation is {type(annotation).__name__}, not an object", location=location)
    return annotation


def overlay_bench_boxes(annotation: Mapping[str, Any], location: str) -> dict[str, RawBox]:
    """Name -> box on a square of `OVERLAY_SIDE` pixels, in the file's order; short: `category`, long: `local_prompts`."""
    entries = need(annotation, "annotations", f"{location}: annotation")
    if not isinstance(entries, Mapping):
        raise InputError(f"annotations is {type(entries).__name__}, not an object", location=location)
    boxes = {}
    for name, entry in entries.items():
        place = f"{location}: annotations[{shown(name)}]"
        boxes[str(name)] = RawBox(place, need(entry, "bbox", place), entry.get("category"), entry.get("local_prompts"))
    return boxes


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
        hint = "give COCO's images with --images DIR"
        raise InputError("COCO-MIG has layouts and no images", location=str(path), hint=hint)
    for prompt, entry, location in coco_mig_prompts(path):
        yield partial(_coco_mig, prompt, entry, location, context)


def coco_mig_prompts(path: Path) -> Iterator[tuple[str, Any, str]]:
    """(prompt, its entry, location) of a mig_bench_anno.yaml. Raises `InputError` where it is no YAML of prompts."""
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise InputError(f"holds {type(data).__name__}, not prompts", location=str(path))
    for index, (prompt, entry) in enumerate(data.items()):
        yield prompt, entry, f"{path}: prompt {index}"


def coco_mig_boxes(entry: Any, location: str) -> list[RawBox]:
    """The boxes of a prompt's entry, relative; short: the phrase, e.g. "a red car"."""
    return [
        RawBox(f"{location}: {phrase}[{index}]", value, text(phrase, "the phrase", location))
        for phrase in entry
        if phrase != "coco_id"
        for index, value in enumerate(items_of(entry, phrase, location))
    ]


def _coco_mig(prompt: Any, entry: Any, location: str, context: Context) -> Sample:
    key = str(need(entry, "coco_id", location)).rjust(12, "0")
    try:
        image = context.image_finder.find(f"COCO_val2014_{key}.jpg", location)
    except MissingImageError:
        image = context.image_finder.find(f"{key}.jpg", location)
    things = context.things(coco_mig_boxes(entry, location), "xyxy", image=image)
    return Sample(image, location, things, text(prompt, "the prompt", location))


def read_eligen(context: Context) -> Reads:
    """EliGen: metadata.json (or .jsonl): {image, prompt, eligen_entity_prompts, eligen_entity_masks}. The box is around the mask.

    A pixel belongs to a mask where it is brighter than half.
    """
    src = context.src
    paths = [src] if src.is_file() else [p for p in (src / "metadata.json", src / "metadata.jsonl") if p.is_file()][:1]
    if not paths:
        raise InputError("has no metadata.json", location=str(src))
    files = ImageFinder(*([context.images] if context.images else []), paths[0].parent)
    return each(rows(paths), partial(_eligen, files=files, context=context))


def _eligen(row: Any, location: str, files: ImageFinder, context: Context) -> Sample:
    image = files.find(need_text(row, "image", location), location)
    prompts, masks = (items_of(row, f"eligen_entity_{key}", location) for key in ("prompts", "masks"))
    if len(prompts) != len(masks):
        raise InputError(f"{len(prompts)} prompts and {len(masks)} masks", location=location)
    things = []
    for index, (prompt, name) in enumerate(zip(prompts, masks, strict=True)):
        place = f"{location}: eligen_entity_masks[{index}]"
        try:
            mask = load_image(files.find(text(name, "the mask", place), place)).convert("L")
        except MissingImageError as error:
            raise InputError(error.what, location=place) from None
        around = mask.point(lambda value: 255 if value > 127 else 0).getbbox()
        if around is None:
            context.leave_out("empty masks")
            continue
        phrase = text(prompt, "the prompt", f"{location}: eligen_entity_prompts[{index}]")
        things += context.things([RawBox(place, around, phrase)], "xyxy", unit="pixel", size=mask.size)
    caption = row.get("prompt")
    return Sample(image, location, things, text(caption, "the prompt", location) if caption else None)


def _span(caption: Any, start: Any, end: Any, location: str) -> str:
    """The text between two places of a caption. Raises `InputError` where there is none."""
    first, last = number(start, location), number(end, location)
    if not isinstance(caption, str) or not 0 <= first < last <= len(caption):
        raise InputError(f"the span {start}:{end} is not in the caption", location=location)
    return text(caption[int(first) : int(last)], "the span", location)


def _unpacked(value: Any, location: str) -> Any:
    """An object, or the one that a JSON text holds."""
    if isinstance(value, str):
        value = parse_json(value, location=location)
    if not isinstance(value, Mapping):
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
