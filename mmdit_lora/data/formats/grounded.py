"""Sets of grounded captions and instances: GRIT, HiCo, GLIGEN, InstanceDiffusion, Flickr30k Entities, EliGen."""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from mmdit_lora.data.formats.common import (
    XYXY,
    Context,
    ImageFinder,
    MissingImageError,
    Reads,
    Sample,
    is_file,
    items_of,
    need,
    number,
    read_text,
    size_of,
    spoken,
    stated_size,
    text,
)
from mmdit_lora.data.formats.tables import each, rows, table_files
from mmdit_lora.data.formats.xml import child_number, parse_xml
from mmdit_lora.data.images import load_image
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import inside
from mmdit_lora.json_files import parse_json, read_json

Things = list[tuple[str, XYXY]]


def read_grit(context: Context) -> Reads:
    """GRIT (parquet, or the json files that img2dataset writes): `noun_chunks` [[start, end, x0, y0, x1, y1, score], ...].

    The phrase is `caption[start:end]`; with `detailed` `ref_exps`, the longer expressions, are taken. Images are
    `<key>.jpg` below `--images`.
    """
    return each(rows(table_files(context, ".parquet", ".jsonl", ".json")), partial(_grit, context=context))


def _grit(row: Any, location: str, context: Context) -> Sample:
    caption = need(row, "caption", location)
    image = context.image_finder.find(str(row.get("key") or need(row, "id", location)), location)
    column = "ref_exps" if context.detailed else "noun_chunks"
    things: Things = []
    for index, chunk in enumerate(items_of(row, column, location)):
        place = f"{location}: {column}[{index}]"
        if not isinstance(chunk, list) or len(chunk) not in (6, 7):
            raise InputError(
                f"is {shown(chunk)}", location=place, hint="a chunk is [start, end, x0, y0, x1, y1, score]"
            )
        phrase = _span(caption, chunk[0], chunk[1], place)
        _add(things, phrase, context.box(chunk[2:6], "xyxy", place, image=image))
    return Sample(image, location, things, text(caption, "the caption", location))


def read_hico(context: Context) -> Reads:
    """HiCo json: entries [base_info, caption, obj_nums, img_size, path_img, list_bbox_info, ...], or objects of these keys.

    `list_bbox_info` holds [text, [x0, y0, x1, y1]] or [text, x0, y0, x1, y1]: pixels of `img_size` {H, W}.
    """
    table = rows(table_files(context, ".json", ".jsonl"))
    return each(((location, _hico_object(row)) for location, row in table), partial(_hico, context=context))


_HICO = ("base_info", "caption", "obj_nums", "img_size", "path_img", "list_bbox_info")


def _hico_object(row: Any) -> Any:
    return dict(zip(_HICO, row, strict=False)) if isinstance(row, list) and len(row) >= len(_HICO) else row


def _hico(row: Any, location: str, context: Context) -> Sample:
    image = context.image_finder.find(text(need(row, "path_img", location), "path_img", location), location)
    said = need(row, "img_size", location)
    size = stated_size(image, (need(said, "W", location), need(said, "H", location)), location)
    things: Things = []
    for index, entry in enumerate(items_of(row, "list_bbox_info", location)):
        place = f"{location}: list_bbox_info[{index}]"
        if not isinstance(entry, list) or len(entry) not in (2, 5):
            raise InputError(f"is {shown(entry)}", location=place, hint="write [text, [x0, y0, x1, y1]]")
        corners = entry[1] if len(entry) == 2 else entry[1:]
        phrase = text(entry[0], "the text", place)
        _add(things, phrase, context.box(corners, "xyxy", place, unit="pixel", size=size))
    return Sample(image, location, things, text(need(row, "caption", location), "the caption", location))


def read_gligen(context: Context) -> Reads:
    """GLIGEN's TSV: a key and a JSON object a line: {image (base64), file_name, caption, annos [{bbox, tokens_positive}]}.

    `bbox` is xywh in pixels: GLIGEN's notes say x, y, h, w, its code reads x, y, w, h. The phrase are the spans
    `tokens_positive` of the caption. Embeddings, which are stored beside, are not read.
    """
    table = rows(table_files(context, ".tsv"), header=["key", "json"])
    return each(table, partial(_gligen, context=context))


def _gligen(row: Any, location: str, context: Context) -> Sample:
    data = parse_json(need(row, "json", location), location=location)
    caption = text(need(data, "caption", location), "the caption", location)
    image = _base64_image(data, str(data.get("data_id", row["key"])), location, context)
    size = size_of(image, location)
    things: Things = []
    for index, anno in enumerate(items_of(data, "annos", location)):
        place = f"{location}: annos[{index}]"
        spans = need(anno, "tokens_positive", place)
        spans = [spans] if isinstance(spans, list) and spans and not isinstance(spans[0], list) else spans
        if not isinstance(spans, list) or not spans or not all(isinstance(s, list) and len(s) == 2 for s in spans):
            raise InputError(f"tokens_positive is {shown(spans)}", location=place, hint="write [[start, end], ...]")
        phrase = " ".join(_span(data["caption"], start, end, place) for start, end in spans)
        _add(things, phrase, context.box(need(anno, "bbox", place), "xywh", place, unit="pixel", size=size))
    return Sample(image, location, things, caption)


def read_instance_diffusion(context: Context) -> Reads:
    """InstanceDiffusion: json files (or a .txt that lists them): {caption, width, height, image (base64), annos}.

    An entry of `annos` has `bbox` (xywh in pixels), `category_name` and `caption` (taken with `detailed`). Without `image`,
    as in the inference json, the image has the json's stem or `file_name`, below `--images`.
    """
    src = context.src
    if src.suffix == ".txt" and src.is_file():
        listed = [(n, line.strip()) for n, line in enumerate(read_text(src).splitlines(), start=1) if line.strip()]
        for line_number, name in listed:
            yield partial(_listed_instances, name, f"{src}:{line_number}", context)
        return
    for path in table_files(context, ".json"):
        yield partial(_instances, path, context)


def _listed_instances(name: str, location: str, context: Context) -> Sample:
    folder = context.src.parent
    # Lists often hold paths of another machine: then the file of that name beside the list is meant.
    path = next(
        (p for p in (_below(folder, name, location), folder / PureWindowsPath(name).name) if p and is_file(p)), None
    )
    if path is None:
        raise InputError(f"names {name!r}, which does not exist", location=location)
    return _instances(path, context)


def _instances(path: Path, context: Context) -> Sample:
    data, location = read_json(path), str(path)
    caption = text(need(data, "caption", location), "the caption", location)
    if data.get("image"):
        image = _base64_image(data, path.stem, location, context)
    else:
        image = context.image_finder.find(str(data.get("file_name") or path.stem), location)
    size = stated_size(image, (need(data, "width", location), need(data, "height", location)), location)
    things: Things = []
    for index, anno in enumerate(items_of(data, "annos", location)):
        place = f"{location}: annos[{index}]"
        box = context.box(need(anno, "bbox", place), "xywh", place, unit="pixel", size=size)
        _add(things, spoken(anno.get("category_name"), anno.get("caption"), context.detailed, place), box)
    return Sample(image, location, things, caption)


def _below(folder: Path, name: str, location: str) -> Path | None:
    try:
        return inside(folder, name, location=location)
    except InputError:
        return None


_ENTITY = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")


def read_flickr30k(context: Context) -> Reads:
    """Flickr30k Entities: Sentences/<id>.txt, Annotations/<id>.xml, images `<id>.jpg`; splits are train.txt and so on.

    The caption is the first of the five sentences; its phrases are given the boxes of their chain. Boxes are xyxy in
    pixels, counted from 1, as in VOC (its own tools subtract 1).

    Raises:
        InputError: a folder or the split is missing. A record: its xml, sentence or image is wrong.
    """
    src, split = context.src, context.split
    for name in ("Sentences", "Annotations"):
        if not (src / name).is_dir():
            raise InputError(f"has no folder {name}", location=str(src))
    if split is not None:
        listing = src / f"{split}.txt"
        if not listing.is_file():
            raise InputError(f"has no {split}.txt", location=str(src), hint="leave --split away")
        stems = read_text(listing).split()
        for stem in stems:
            inside(src, stem, location=str(listing), what="image")
    else:
        stems = sorted(path.stem for path in (src / "Sentences").glob("*.txt"))
    for stem in stems:
        yield partial(_flickr30k, stem, context)


def _flickr30k(stem: str, context: Context) -> Sample:
    file, path = context.src / "Sentences" / f"{stem}.txt", context.src / "Annotations" / f"{stem}.xml"
    location = f"{file}:1"
    sentence = read_text(file).split("\n")[0].strip()
    root = parse_xml(path)
    image = context.image_finder.find(f"{stem}.jpg", location)
    size = size_of(image, location)
    chains: defaultdict[str, list[XYXY]] = defaultdict(list)
    for index, item in enumerate(root.findall("object"), start=1):
        box = item.find("bndbox")
        if box is None:  # said of the scene, or seen nowhere
            continue
        place = f"{path}: object {index}"
        left, top, right, bottom = (child_number(box, tag, place) for tag in ("xmin", "ymin", "xmax", "ymax"))
        xyxy = context.box((left - 1, top - 1, right, bottom), "xyxy", place, unit="pixel", size=size)
        for name in item.findall("name"):
            if xyxy is not None:
                chains[(name.text or "").strip()].append(xyxy)
    left = sum(chain not in chains for chain, _ in _ENTITY.findall(sentence))
    context.left_out.update({"phrases without a box": left} if left else {})
    things = [(phrase, box) for chain, phrase in _ENTITY.findall(sentence) for box in chains.get(chain, [])]
    return Sample(image, location, things, text(_ENTITY.sub(r"\2", sentence), "the sentence", location))


def read_eligen(context: Context) -> Reads:
    """EliGen: metadata.json (or .jsonl): {image, prompt, eligen_entity_prompts, eligen_entity_masks}. The box is around the mask.

    A pixel belongs to a mask where it is brighter than half.
    """
    src = context.src
    path = (
        src if src.is_file() else next((p for p in (src / "metadata.json", src / "metadata.jsonl") if p.is_file()), src)
    )
    if path == src and not src.is_file():
        raise InputError("has no metadata.json", location=str(src))
    files = ImageFinder(*([context.images] if context.images else []), path.parent)
    return each(rows([path]), partial(_eligen, files=files, context=context))


def _eligen(row: Any, location: str, files: ImageFinder, context: Context) -> Sample:
    image = files.find(text(need(row, "image", location), "image", location), location)
    prompts, masks = (items_of(row, f"eligen_entity_{key}", location) for key in ("prompts", "masks"))
    if len(prompts) != len(masks):
        raise InputError(f"{len(prompts)} prompts and {len(masks)} masks", location=location)
    things: Things = []
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
        _add(things, phrase, context.box(around, "xyxy", place, unit="pixel", size=mask.size))
    caption = row.get("prompt")
    return Sample(image, location, things, text(caption, "the prompt", location) if caption else None)


def _add(things: Things, phrase: str, box: XYXY | None) -> None:
    if box is not None:
        things.append((phrase, box))


def _span(caption: Any, start: Any, end: Any, location: str) -> str:
    """The text between two places of a caption. Raises `InputError` where there is none."""
    first, last = number(start, location), number(end, location)
    if not isinstance(caption, str) or not 0 <= first < last <= len(caption):
        raise InputError(f"the span {start}:{end} is not in the caption", location=location)
    return text(caption[int(first) : int(last)], "the span", location)


def _base64_image(data: Mapping[str, Any], stem: str, location: str, context: Context) -> Path:
    try:
        content = base64.b64decode(text(need(data, "image", location), "image", location), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise InputError(f"its image is no base64 ({error})", location=location) from None
    return context.unpacked(content, stem, location)
