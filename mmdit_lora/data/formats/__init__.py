"""Anyone's boxes in, and out again: `FORMATS` lists what is known; `read_format` and `write_format` are all that is called.

A format is a file of this package (or a few of one kind share a file) and a line in `FORMATS`. Its reader yields one call a
record; its boxes leave `Context.box` as relative xyxy, clipped to the image. The order of the numbers and their unit are
known by the format, or declared by the caller; nothing is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.captions import SIDECAR, Captions
from mmdit_lora.data.formats.coco import read_coco, write_coco
from mmdit_lora.data.formats.common import (
    DEFAULT_CAPTION,
    Context,
    MissingImageError,
    Reads,
    Sample,
    check_caption,
)
from mmdit_lora.data.formats.grounded import (
    read_eligen,
    read_flickr30k,
    read_gligen,
    read_grit,
    read_hico,
    read_instance_diffusion,
)
from mmdit_lora.data.formats.hugging_face import read_hugging_face
from mmdit_lora.data.formats.layout_sets import (
    read_coco_mig,
    read_dense_layout,
    read_layout_sam,
    read_layout_sam_eval,
    read_overlay_bench,
    read_sacap,
)
from mmdit_lora.data.formats.open_images import read_open_images
from mmdit_lora.data.formats.tools import read_cvat, read_label_studio
from mmdit_lora.data.formats.trainers import read_comfyui, read_simpletuner, write_simpletuner
from mmdit_lora.data.formats.voc import read_voc, write_voc
from mmdit_lora.data.formats.yolo import read_yolo, write_yolo
from mmdit_lora.data.records import Item, Record, fill_dataset, scan_dataset
from mmdit_lora.data.written import Written, hint, read_written, set_evidence
from mmdit_lora.errors import InputError, several, unknown_key
from mmdit_lora.layout import Box, BoxError, Layout, check_count
from mmdit_lora.outputs import new_folder


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        read: records of a source; None: the package's own format, which has a reader apart.
        write: fills an empty folder; None: this format is only read.
        source: what SRC is. convention: order of a box's numbers, and their unit.
        classes: whether its names are those of classes, which become phrases in lower case.
        takes: options of `read_format` that mean something for it, of `split`, `images`, `detailed`, `bbox`.
    """

    read: Callable[[Context], Reads] | None
    source: str
    convention: str
    write: Callable[[Path, Iterable[Item]], None] | None = None
    classes: bool = False
    takes: tuple[str, ...] = ("split", "images")


FORMATS: dict[str, Format] = {
    "jsonl": Format(
        None,
        "a folder with metadata.jsonl (Hugging Face imagefolder)",
        "xyxy relative, or as the line, --bbox-format and --bbox-units say",
        fill_dataset,
        takes=("bbox",),
    ),
    "hf": Format(
        read_hugging_face,
        "Hugging Face datasets: *.parquet with `image`, `caption`, `objects`",
        "as --bbox-format and --bbox-units say; without them refused, with the evidence",
        takes=("split", "bbox"),
    ),
    "voc": Format(
        read_voc,
        "Pascal VOC: JPEGImages, Annotations",
        "xyxy in pixels, counted from 1 (from 0 where a 0 stands)",
        write_voc,
        classes=True,
    ),
    "coco": Format(
        read_coco,
        "COCO: annotations/instances_*.json (or that file), captions_*.json",
        "xywh in pixels; polygons, RLE",
        write_coco,
        classes=True,
    ),
    "yolo": Format(
        read_yolo,
        "YOLO: data.yaml or classes.txt, images, labels",
        "cxcywh relative; polygons relative",
        write_yolo,
        classes=True,
    ),
    "openimages": Format(
        read_open_images,
        "Open Images: *-annotations-bbox.csv, class-descriptions*.csv, images `<ImageID>.jpg`",
        "x, x, y, y relative",
        classes=True,
    ),
    "labelstudio": Format(
        read_label_studio,
        "Label Studio: export JSON or JSON_MIN",
        "xywh in percent; polygons, ellipses, turned boxes: the upright box around them",
        classes=True,
    ),
    "cvat": Format(
        read_cvat,
        "CVAT for images: annotations.xml",
        "xyxy in pixels; polygons, turned boxes: the upright box around them",
        classes=True,
    ),
    "simpletuner": Format(
        read_simpletuner,
        "SimpleTuner: a .bbox (JSON, JSON lines, YOLO lines) beside each image, captions in .txt",
        "xyxy relative; YOLO lines cxcywh relative",
        write_simpletuner,
        takes=("images",),
    ),
    "comfyui": Format(
        read_comfyui,
        "ComfyUI bounding boxes: a .json beside each image, captions in .txt",
        "xywh in pixels",
        takes=("images",),
    ),
    "layoutsam": Format(
        read_layout_sam,
        "LayoutSAM: train/*.parquet; SA-1B's images with --images",
        "xyxy in pixels of the stated size",
        takes=("split", "images", "detailed"),
    ),
    "layoutsam-eval": Format(
        read_layout_sam_eval,
        "LayoutSAM-eval: *.parquet, which hold the images",
        "xyxy in pixels of the stated size",
        takes=("split", "detailed"),
    ),
    "denselayout": Format(
        read_dense_layout,
        "DenseLayout: *.parquet or json; images in them, or `<id>.jpg` with --images",
        "xyxy in pixels of the stated size",
        takes=("split", "images", "detailed"),
    ),
    "sacap": Format(
        read_sacap,
        "SACap-1M, SACap-eval: *.parquet; SA-1B's images and json files with --images",
        "xywh in pixels, or masks, of SA-1B's json",
        takes=("split", "images", "detailed"),
    ),
    "overlaybench": Format(
        read_overlay_bench,
        "OverLayBench: *.parquet; images in them, or `<image_id>.*` with --images",
        "xyxy on a square of 1024 pixels",
        takes=("split", "images", "detailed"),
    ),
    "cocomig": Format(
        read_coco_mig,
        "COCO-MIG: mig_bench_anno.yaml; COCO's images with --images",
        "xyxy relative",
        takes=("images",),
    ),
    "grit": Format(
        read_grit,
        "GRIT: *.parquet or json; images `<key>.jpg` with --images",
        "xyxy relative",
        takes=("split", "images", "detailed"),
    ),
    "hico": Format(read_hico, "HiCo: *.json", "xyxy in pixels of the stated size"),
    "gligen": Format(read_gligen, "GLIGEN: *.tsv, which hold the images", "xywh in pixels", takes=("split",)),
    "instancediffusion": Format(
        read_instance_diffusion,
        "InstanceDiffusion: *.json or a .txt that lists them; images in them, or with --images",
        "xywh in pixels of the stated size",
        takes=("split", "images", "detailed"),
    ),
    "flickr30k": Format(
        read_flickr30k, "Flickr30k Entities: Sentences, Annotations; images", "xyxy in pixels, counted from 1"
    ),
    "eligen": Format(read_eligen, "EliGen: metadata.json, masks", "masks: the box around each", takes=("images",)),
}


@dataclass(frozen=True)
class Source:
    """What was read.

    Args:
        left_out: how often something was left out, by reason.
        errors: of records that could not be read; empty unless they were asked for.
        notes: facts of the format for `--json`. remarks: lines for people.
        warnings: what disagreed in the set, where, and what was taken instead; many of a kind are summed up.
    """

    records: list[Record]
    left_out: Mapping[str, int]
    errors: list[InputError] = field(default_factory=list)
    notes: Mapping[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Holds the folder of images that lay inside other files, as long as the records may be used.
    _context: Context | None = field(default=None, repr=False)


def find_format(name: str, *, option: str = "--from") -> Format:
    """The format of that name. Raises `InputError` that names the nearest one."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown format {name!r}", location=option, hint=f"{hint}known formats: {', '.join(FORMATS)}")


_OPTIONS = {"split": "--split", "images": "--images", "detailed": "--detailed", "bbox": "--bbox-format, --bbox-units"}


def read_format(
    name: str,
    src: str | Path,
    *,
    split: str | None = None,
    images: Path | None = None,
    caption: str | None = None,
    captions: Path | None = None,
    phrases: Mapping[str, str] | None = None,
    detailed: bool = False,
    bbox_format: str | None = None,
    bbox_units: str | None = None,
    skip_missing: bool = False,
    collect_errors: bool = False,
) -> Source:
    """Read a data set of another format. Empty boxes, and images that have no box, are left out and counted.

    Args:
        name: a key of `FORMATS`.
        split: a part of the source, where it has such.
        images: folder of the images, where they lie elsewhere than the annotations.
        caption: template of the captions; `{phrases}` are the distinct phrases of the image, in their order. None: the
            set's own captions, and "a photo of {phrases}" for records that have none.
        captions: captions from beside the set (see `Captions`); they go before all others.
        phrases: class name -> phrase.
        detailed: take the longer of two descriptions of a box, where a set has both.
        bbox_format, bbox_units: the convention, for formats that do not know it.
        skip_missing: leave records out whose image is not there.
        collect_errors: return the errors of single records instead of raising them together.

    Raises:
        InputError: the source does not exist or is wrong; the template has another placeholder; `phrases` names no class
            of the set. With file and line, or file and number of the record.
    """
    kind, phrases = find_format(name), phrases or {}
    given = {"split": split, "images": images, "detailed": detailed or None, "bbox": bbox_format or bbox_units}
    for option, value in given.items():
        if value is not None and option not in kind.takes:
            raise InputError(f"means nothing for {name}", location=_OPTIONS[option], hint="leave it away")
    if split is not None and Path(src).is_file() and name != "cvat":
        raise InputError("is one file: it has no splits", location=str(src), hint="leave --split away")
    template = DEFAULT_CAPTION if caption is None else caption
    check_caption(template)
    context = Context(Path(src), split, images, detailed, bbox_format, bbox_units)
    sidecar = _sidecar(context.src, captions)
    records: list[Record] = []
    errors: list[InputError] = []
    names: set[str] = set()
    reads = _own_format(context) if kind.read is None else kind.read(context)
    for read in reads:
        try:
            sample = read()
            if not sample.things and kind.read is not None:
                context.leave_out("images without a box")
                continue
            beside = sidecar.get(sample.image) if sidecar else None
            boxes = _boxes(sample, phrases, lower=kind.classes)
            own = sample.caption if caption is None else None
            made = template.format(phrases=", ".join(dict.fromkeys(box.phrase for box in boxes)))
            text = next(choice for choice in (beside, own, made) if choice is not None)
            layout = _layout(text, boxes, sample.location)
        except InputError as error:
            if skip_missing and isinstance(error, MissingImageError):
                context.leave_out("records whose image is not there")
                continue
            errors.append(error)
            continue
        names.update(thing for thing, _ in sample.things)
        records.append(Record(image=sample.image, layout=layout, location=sample.location))
    if errors and not collect_errors:
        found = hint(set_evidence(_own_written(context))) if kind.read is None and _of_boxes(errors) else None
        raise several(errors, location=str(src), hint=found)
    if not records and not errors:
        raise InputError("holds no image with a box", location=str(src))
    for key in phrases:
        if key not in names and not errors:
            raise unknown_key(key, sorted(names), location="--map")
    return Source(
        records, dict(context.left_out), errors, context.notes, context.remarks, context.warnings.lines(), context
    )


def write_format(name: str, out: str | Path, parts: Mapping[str, Iterable[Item]]) -> Path:
    """Write data sets of a format into `out` (or, by the parts' names, into its subfolders), all of them or nothing.

    Args:
        name: a key of `FORMATS`. parts: subfolder ("" for `out` itself) -> items.

    Raises:
        InputError: the format is only read, cannot hold the items, or `out` holds something that would be destroyed.
    """
    write = find_format(name, option="--to").write
    if write is None:
        writable = ", ".join(key for key, value in FORMATS.items() if value.write)
        raise InputError(f"{name} is read, not written", location="--to", hint=f"give one of {writable}")
    with new_folder(out, verb="data convert") as folder:
        for part, items in parts.items():
            (folder / part).mkdir(exist_ok=True)
            write(folder / part, items)
    return Path(out).resolve()


def _layout(caption: str, boxes: tuple[Box, ...], location: str) -> Layout:
    try:
        return Layout(caption=caption, boxes=boxes)
    except InputError as error:
        raise error.at(location) from None


def _of_boxes(errors: Iterable[InputError]) -> bool:
    return any(isinstance(error, BoxError) for error in errors)


def _own_written(context: Context) -> list[Written]:
    return read_written(
        context.src, bbox_format=context.bbox_format or "xyxy", bbox_units=context.bbox_units or "relative"
    )


def _own_format(context: Context) -> Reads:
    records, errors = scan_dataset(
        context.src,
        bbox_format=context.bbox_format or "xyxy",
        bbox_units=context.bbox_units or "relative",
        warnings=context.warnings,
    )
    for record in records:
        yield partial(_as_sample, record)
    for error in errors:
        yield partial(_raise, error)


def _as_sample(record: Record) -> Sample:
    things = [(box.phrase, box.xyxy) for box in record.layout.boxes]
    return Sample(record.image, record.location, things, record.layout.caption)


def _raise(error: InputError) -> Sample:
    raise error


def _sidecar(src: Path, given: Path | None) -> Captions | None:
    if given is not None:
        return Captions(given)
    beside = src / SIDECAR
    return Captions(beside) if beside.is_file() else None


def _boxes(sample: Sample, phrases: Mapping[str, str], *, lower: bool) -> tuple[Box, ...]:
    boxes = []
    try:
        check_count(len(sample.things))
    except InputError as error:
        raise error.at(sample.location) from None
    for index, (name, xyxy) in enumerate(sample.things):
        try:
            boxes.append(Box(xyxy=xyxy, phrase=phrases.get(name, name.lower() if lower else name)))
        except InputError as error:
            raise error.at(f"{sample.location}: box {index}") from None
    return tuple(boxes)


def format_table() -> str:
    """`FORMATS` as a Markdown table: format, SRC, convention, whether it is written too."""
    lines = ["| format | SRC | boxes | |", "| --- | --- | --- | --- |"]
    for name, kind in FORMATS.items():
        lines.append(f"| `{name}` | {kind.source} | {kind.convention} | {'read, write' if kind.write else 'read'} |")
    return "\n".join(lines)
