"""Anyone's boxes in, and out again: `FORMATS` lists what is known; `read_format` and `write_format` are all that is called.

A format is a file of this package (or a few of one kind share a file) and an entry in `FORMATS`. Its reader yields one call a
record; its boxes leave `Context.box` as relative xyxy, clipped to the image. The order of the numbers and their unit are
known by the format, or declared by the caller; nothing is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mmdit_lora.data.formats import layout_sets as sets
from mmdit_lora.data.formats.captions import SIDECAR, Captions
from mmdit_lora.data.formats.coco import read_coco, write_coco
from mmdit_lora.data.formats.common import DEFAULT_CAPTION, Context, MissingImageError, Reads, Sample, check_caption
from mmdit_lora.data.formats.hugging_face import read_hugging_face
from mmdit_lora.data.formats.open_images import read_open_images
from mmdit_lora.data.formats.tools import read_comfyui, read_label_studio, read_simpletuner, write_simpletuner
from mmdit_lora.data.formats.voc import read_voc, write_voc
from mmdit_lora.data.formats.xml import read_cvat, read_flickr30k
from mmdit_lora.data.formats.yolo import read_yolo, write_yolo
from mmdit_lora.data.records import Item, Record, fill_dataset, reading_hint, scan_dataset
from mmdit_lora.errors import InputError, several, unknown_key
from mmdit_lora.layout import Box, Layout, check_count
from mmdit_lora.outputs import new_folder

_OPTIONS = {"split": "--split", "images": "--images", "detailed": "--detailed", "bbox": "--bbox-format, --bbox-units"}
_BESIDE = ("split", "images")
_ALL = (*_BESIDE, "detailed")


class Format(NamedTuple):
    """One format.

    Args:
        source: what SRC is. convention: order of a box's numbers, and their unit.
        read: records of a source; None: the package's own format, which has a reader apart.
        write: fills an empty folder; None: this format is only read.
        takes: options of `read_format` that mean something for it, keys of `_OPTIONS`.
        classes: whether its names are those of classes, which become phrases in lower case.
    """

    source: str
    convention: str
    read: Callable[[Context], Reads] | None
    write: Callable[[Path, Iterable[Item]], None] | None = None
    takes: tuple[str, ...] = _BESIDE
    classes: bool = False


_OF_SIZE, _PIXELS = "xyxy in pixels of the stated size", "xywh in pixels"
FORMATS: dict[str, Format] = {
    name: Format(*entry)  # type: ignore[arg-type]
    for name, entry in {
        "jsonl": (
            "a folder with metadata.jsonl (Hugging Face imagefolder)",
            "xyxy relative, or as the line, --bbox-format and --bbox-units say",
            *(None, fill_dataset, ("bbox",)),
        ),
        "hf": (
            "Hugging Face datasets: *.parquet with `image`, `caption`, `objects`",
            "as --bbox-format and --bbox-units say; without them refused, with the evidence",
            *(read_hugging_face, None, ("split", "bbox")),
        ),
        "voc": (
            "Pascal VOC: JPEGImages, Annotations",
            "xyxy in pixels, counted from 1 (from 0 where a 0 stands)",
            *(read_voc, write_voc, _BESIDE, True),
        ),
        "coco": (
            "COCO: annotations/instances_*.json (or that file), captions_*.json",
            "xywh in pixels; polygons, RLE",
            *(read_coco, write_coco, _BESIDE, True),
        ),
        "yolo": (
            "YOLO: data.yaml or classes.txt, images, labels",
            "cxcywh relative; polygons relative",
            *(read_yolo, write_yolo, _BESIDE, True),
        ),
        "openimages": (
            "Open Images: *-annotations-bbox.csv, class-descriptions*.csv, images `<ImageID>.jpg`",
            "x, x, y, y relative",
            *(read_open_images, None, _BESIDE, True),
        ),
        "labelstudio": (
            "Label Studio: export JSON or JSON_MIN",
            "xywh in percent; polygons, ellipses, turned boxes: the upright box around them",
            *(read_label_studio, None, _BESIDE, True),
        ),
        "cvat": (
            "CVAT for images: annotations.xml",
            "xyxy in pixels; polygons, turned boxes: the upright box around them",
            *(read_cvat, None, _BESIDE, True),
        ),
        "simpletuner": (
            "SimpleTuner: a .bbox (JSON, JSON lines, YOLO lines) beside each image, captions in .txt",
            "xyxy relative; YOLO lines cxcywh relative",
            *(read_simpletuner, write_simpletuner, ("images",)),
        ),
        "comfyui": (
            "ComfyUI bounding boxes: a .json beside each image, captions in .txt",
            *(_PIXELS, read_comfyui, None, ("images",)),
        ),
        "layoutsam": (
            "LayoutSAM: train/*.parquet; SA-1B's images with --images",
            *(_OF_SIZE, sets.read_layout_sam, None, _ALL),
        ),
        "layoutsam-eval": (
            "LayoutSAM-eval: *.parquet, which hold the images",
            *(_OF_SIZE, sets.read_layout_sam_eval, None, ("split", "detailed")),
        ),
        "denselayout": (
            "DenseLayout: *.parquet or json; images in them, or `<id>.jpg` with --images",
            *(_OF_SIZE, sets.read_dense_layout, None, _ALL),
        ),
        "sacap": (
            "SACap-1M, SACap-eval: *.parquet; SA-1B's images and json files with --images",
            "xywh in pixels, or masks, of SA-1B's json",
            *(sets.read_sacap, None, _ALL),
        ),
        "overlaybench": (
            "OverLayBench: *.parquet; images in them, or `<image_id>.*` with --images",
            "xyxy on a square of 1024 pixels",
            *(sets.read_overlay_bench, None, _ALL),
        ),
        "cocomig": (
            "COCO-MIG: mig_bench_anno.yaml; COCO's images with --images",
            "xyxy relative",
            *(sets.read_coco_mig, None, ("images",)),
        ),
        "grit": (
            "GRIT: *.parquet or json; images `<key>.jpg` with --images",
            *("xyxy relative", sets.read_grit, None, _ALL),
        ),
        "hico": ("HiCo: *.json", _OF_SIZE, sets.read_hico),
        "gligen": ("GLIGEN: *.tsv, which hold the images", _PIXELS, sets.read_gligen, None, ("split",)),
        "instancediffusion": (
            "InstanceDiffusion: *.json or a .txt that lists them; images in them, or with --images",
            "xywh in pixels of the stated size",
            *(sets.read_instance_diffusion, None, _ALL),
        ),
        "flickr30k": (
            "Flickr30k Entities: Sentences, Annotations; images",
            *("xyxy in pixels, counted from 1", read_flickr30k),
        ),
        "eligen": (
            "EliGen: metadata.json, masks",
            *("masks: the box around each", sets.read_eligen, None, ("images",)),
        ),
    }.items()
}


@dataclass(frozen=True)
class Source:
    """What was read.

    Args:
        left_out: how often something was left out, by reason.
        errors: of records that could not be read; empty without `collect_errors`.
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
    if captions is None and (context.src / SIDECAR).is_file():
        captions = context.src / SIDECAR
    sidecar = None if captions is None else Captions(captions)
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
            own = sample.caption if caption is None else None
            layout = _layout(sample, next((c for c in (beside, own) if c is not None), None), template, kind, phrases)
        except InputError as error:
            if skip_missing and isinstance(error, MissingImageError):
                context.leave_out("records whose image is not there")
                continue
            errors.append(error)
            continue
        names.update(thing for thing, _ in sample.things)
        records.append(Record(image=sample.image, layout=layout, location=sample.location))
    if errors and not collect_errors:
        hint = reading_hint(src, errors, **_conventions(context)) if kind.read is None else None
        raise several(errors, location=str(src), hint=hint)
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


def _own_format(context: Context) -> Reads:
    records, errors = scan_dataset(context.src, **_conventions(context), warnings=context.warnings)
    items: list[Record | InputError] = [*records, *errors]
    for item in items:
        yield partial(_as_sample, item)


def _as_sample(item: Record | InputError) -> Sample:
    if isinstance(item, InputError):
        raise item
    things = [(box.phrase, box.xyxy) for box in item.layout.boxes]
    return Sample(item.image, item.location, things, item.layout.caption)


def _conventions(context: Context) -> dict[str, str]:
    return {"bbox_format": context.bbox_format or "xyxy", "bbox_units": context.bbox_units or "relative"}


def _layout(sample: Sample, caption: str | None, template: str, kind: Format, phrases: Mapping[str, str]) -> Layout:
    place = sample.location
    try:
        check_count(len(sample.things))
        boxes = []
        for index, (name, xyxy) in enumerate(sample.things):
            place = f"{sample.location}: box {index}"
            boxes.append(Box(xyxy=xyxy, phrase=phrases.get(name, name.lower() if kind.classes else name)))
        place = sample.location
        if caption is None:
            caption = template.format(phrases=", ".join(dict.fromkeys(box.phrase for box in boxes)))
        return Layout(caption, tuple(boxes))
    except InputError as error:
        raise error.at(place) from None


def format_table() -> str:
    """`FORMATS` as a Markdown table: format, SRC, convention, whether it is written too."""
    lines = ["| format | SRC | boxes | |", "| --- | --- | --- | --- |"]
    for name, kind in FORMATS.items():
        lines.append(f"| `{name}` | {kind.source} | {kind.convention} | {'read, write' if kind.write else 'read'} |")
    return "\n".join(lines)
