"""Pascal VOC: JPEGImages, Annotations (one XML a picture) and, where there are any, splits in ImageSets/Main.

VOC counts pixels from 1 and includes the last one, so a box covers xmin - 1 .. xmax. Many tools that write VOC count from
0, and their sets give themselves away by a 0 somewhere: then nothing is subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from mmdit_lora.data.formats.captions import write_sidecar
from mmdit_lora.data.formats.common import (
    SUFFIXES,
    Context,
    MissingPictureError,
    Reads,
    Sample,
    flat,
    is_file,
    put_picture,
    require_folder,
    size_of,
    unique,
)
from mmdit_lora.data.formats.xml import child_number, parse_xml
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError, unknown_key

_ZERO = re.compile(rb"<[xy]min>\s*0+(\.0*)?\s*</")


def read_voc(context: Context) -> Reads:
    """Records of a VOC folder, in the order of their names, or of the lines of a split.

    Raises:
        InputError: the folder or the split does not exist. A record: an XML file is damaged, has a DTD, or names no
            picture or a picture of another size.
    """
    src, split = context.src, context.split
    annotations, splits = _annotations(src, context.images), _splits(src)
    from_zero = any(_ZERO.search(path.read_bytes()) for path in annotations)
    context.notes["pixels_from"] = 0 if from_zero else 1
    if from_zero:
        context.remarks.append(
            "pixels were taken to be counted from 0: a box begins there, which VOC's own count from 1 forbids"
        )
    if split is None and splits:
        context.remarks.append(f"every annotation was read; --split takes {', '.join(sorted(splits))}")
    for path in annotations if split is None else _of_split(src, split, splits):
        yield partial(_sample, path, context, from_zero)


def write_voc(folder: Path, items: Iterable[Item]) -> None:
    """Write JPEGImages, Annotations, and `captions.jsonl`, since VOC has no place for captions.

    Coordinates are floats, so that nothing is rounded. The classes are the phrases.

    Raises:
        InputError: a picture has several layouts, or a box is less than a pixel wide or high, which VOC cannot hold.
    """
    stems, named = [], []
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for name, picture, layout in unique(((flat(n), p, layout) for n, p, layout in items), "VOC"):
        width, height = put_picture(picture, folder / "JPEGImages" / name)
        root = Element("annotation")
        SubElement(root, "filename").text = name
        size = SubElement(root, "size")
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            SubElement(size, tag).text = str(value)
        for box in layout.boxes:
            x0, y0, x1, y1 = (v * side for v, side in zip(box.xyxy, (width, height) * 2, strict=True))
            if x1 - x0 <= 1 or y1 - y0 <= 1:
                raise InputError(
                    f"a box of {x1 - x0:.3g} x {y1 - y0:.3g} pixels in {name!r} is too small for VOC",
                    cure="use --to coco",
                )
            item = SubElement(root, "object")
            SubElement(item, "name").text = box.phrase
            bounds = SubElement(item, "bndbox")
            for tag, coordinate in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
                SubElement(bounds, tag).text = repr(coordinate)
        stem = Path(name).stem
        if stem in stems:
            raise InputError(
                f"VOC names pictures by their stem, and {stem!r} stands twice", cure="use --to jsonl or coco"
            )
        stems.append(stem)
        named.append((name, picture, layout))
        indent(root)
        ElementTree(root).write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")
    write_sidecar(folder, named)


def _annotations(src: Path, images: Path | None) -> list[Path]:
    require_folder(src, "give a VOC folder: JPEGImages, Annotations")
    for name in ("Annotations", "JPEGImages"):
        if not (src / name).is_dir() and not (name == "JPEGImages" and images):
            raise InputError(
                f"has no folder {name}", where=str(src), cure="a VOC folder holds JPEGImages and Annotations"
            )
    found = sorted((src / "Annotations").glob("*.xml"))
    if not found:
        raise InputError("holds no .xml file", where=str(src / "Annotations"))
    return found


def _splits(src: Path) -> dict[str, Path]:
    return {path.stem: path for path in (src / "ImageSets" / "Main").glob("*.txt")}


def _of_split(src: Path, split: str, splits: Mapping[str, Path]) -> Iterator[Path]:
    if split not in splits:
        if not splits:
            raise InputError("has no splits (ImageSets/Main)", where=str(src), cure="leave --split away")
        raise unknown_key(split, sorted(splits), where="--split")
    file = splits[split]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text ({error})", where=str(file)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        stem, *member = line.split()
        if member == ["-1"]:  # the lists of one class say for every picture whether it is in
            continue
        path = src / "Annotations" / f"{stem}.xml"
        if PureWindowsPath(stem).name != stem or not path.is_file():
            raise InputError(f"names {stem!r}, which has no annotation", where=f"{file}:{number}")
        yield path


def _sample(path: Path, context: Context, from_zero: bool) -> Sample:
    root = parse_xml(path)
    if root.tag != "annotation":
        raise InputError(f"its root is <{root.tag}>, not <annotation>", where=str(path))
    image = _picture(root, path, context.images or context.src / "JPEGImages")
    size = size_of(image, str(path), _said_size(root, path))
    things = []
    for number, item in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError("has no <name>", where=where)
        box = item.find("bndbox")
        if box is None:
            raise InputError("has no <bndbox>", where=where)
        left, top, right, bottom = (child_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        if right == left or bottom == top:  # before the shift, which would make a pixel of it
            context.leave_out("boxes without area")
            continue
        shift = 0 if from_zero or right < left or bottom < top else 1
        xyxy = context.box((left - shift, top - shift, right, bottom), "xyxy", where, unit="pixel", size=size)
        if xyxy is not None:
            things.append((name, xyxy))
    return Sample(image, str(path), things)


def _picture(root: Element, path: Path, folder: Path) -> Path:
    """The file beside the annotation's own name; else the one that it names (which tools often leave stale)."""
    named = PureWindowsPath((root.findtext("filename") or "").strip()).name
    candidates = [f"{path.stem}{suffix}" for suffix in SUFFIXES] + ([named] if named else [])
    for name in candidates:
        if is_file(folder / name):
            return folder / name
    raise MissingPictureError(
        f"its picture {named or path.stem + '.jpg'!r} is not in {folder.name}",
        where=str(path),
        cure="add it, or leave such records out with --skip-missing",
    )


def _said_size(root: Element, path: Path) -> tuple[float, float] | None:
    element = root.find("size")
    if element is None:
        return None
    where = f"{path}: size"
    return child_number(element, "width", where), child_number(element, "height", where)
