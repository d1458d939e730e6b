"""Pascal VOC: JPEGImages, Annotations (one XML an image) and, where there are any, splits in ImageSets/Main.

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
    MissingImageError,
    RawBox,
    Reads,
    Sample,
    flat,
    is_file,
    put_image,
    require_folder,
    size_of,
    unique,
)
from mmdit_lora.data.formats.xml import bounds, child_number, parse_xml, read_xml
from mmdit_lora.data.records import Item
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.files import read_lines

_ZERO = re.compile(r"<[xy]min>\s*0+(\.0*)?\s*</")


def read_voc(context: Context) -> Reads:
    """Records of a VOC folder, in the order of their names, or of the lines of a split.

    What disagrees and yet can be read (names, extensions, missing sizes, images without annotation) is warned of.

    Raises:
        InputError: the folder or the split does not exist. A record: an XML file is damaged, has a DTD, or names no
            image or an image of another size.
    """
    src, split = context.src, context.split
    annotations = _annotations(src, context.images)
    splits = {path.stem: path for path in (src / "ImageSets" / "Main").glob("*.txt")}
    from_zero = any(map(_begins_at_zero, annotations))
    context.notes["pixels_from"] = 0 if from_zero else 1
    if from_zero:
        context.remarks.append(
            "pixels were taken to be counted from 0: a box begins there, which VOC's own count from 1 forbids"
        )
    if split is None and splits:
        context.remarks.append(f"every annotation was read; --split takes {', '.join(sorted(splits))}")
    taken: dict[Path, Path] = {}
    for path in annotations if split is None else _of_split(src, split, splits):
        yield partial(_sample, path, context, from_zero, taken)
    if split is None:
        _warn_of_leftovers(annotations, splits, context, taken)


def write_voc(folder: Path, items: Iterable[Item]) -> None:
    """Write JPEGImages, Annotations, and `captions.jsonl`, since VOC has no place for captions.

    Coordinates are floats, so that nothing is rounded. The classes are the phrases.

    Raises:
        InputError: an image has several layouts, or a box is less than a pixel wide or high, which VOC cannot hold.
    """
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    items = unique(((flat(name), image, layout) for name, image, layout in items), "VOC")
    for name, image, layout in items:
        width, height = put_image(image, folder / "JPEGImages" / name)
        root = Element("annotation")
        _add(root, filename=name)
        _add(SubElement(root, "size"), width=width, height=height, depth=3)
        for box in layout.boxes:
            x0, y0, x1, y1 = (v * side for v, side in zip(box.xyxy, (width, height) * 2, strict=True))
            if x1 - x0 <= 1 or y1 - y0 <= 1:
                what = f"a box of {x1 - x0:.3g} x {y1 - y0:.3g} pixels in {name!r} is too small for VOC"
                raise InputError(what, hint="use --to coco")
            item = SubElement(root, "object")
            _add(item, name=box.phrase)
            _add(SubElement(item, "bndbox"), xmin=x0 + 1, ymin=y0 + 1, xmax=x1, ymax=y1)
        indent(root)
        ElementTree(root).write(folder / "Annotations" / f"{Path(name).stem}.xml", encoding="utf-8")
    write_sidecar(folder, items)


def _add(element: Element, **values: object) -> None:
    for tag, value in values.items():
        SubElement(element, tag).text = str(value)


def _annotations(src: Path, images: Path | None) -> list[Path]:
    require_folder(src, "give a VOC folder: JPEGImages, Annotations")
    for name in ("Annotations", "JPEGImages"):
        if not (src / name).is_dir() and not (name == "JPEGImages" and images):
            raise InputError(
                f"has no folder {name}", location=str(src), hint="a VOC folder holds JPEGImages and Annotations"
            )
    found = sorted((src / "Annotations").glob("*.xml"))
    if not found:
        raise InputError("holds no .xml file", location=str(src / "Annotations"))
    return found


def _begins_at_zero(path: Path) -> bool:
    try:
        return _ZERO.search(read_xml(path)) is not None
    except InputError:  # what is wrong with it, its reader says
        return False


def _of_split(src: Path, split: str, splits: Mapping[str, Path]) -> Iterator[Path]:
    if split not in splits:
        if not splits:
            raise InputError("has no splits (ImageSets/Main)", location=str(src), hint="leave --split away")
        raise unknown_key(split, sorted(splits), location="--split")
    file = splits[split]
    for number, line in read_lines(file, what="list of a split"):
        stem, *member = line.split()
        if member == ["-1"]:  # the lists of one class say for every image whether it is in
            continue
        path = src / "Annotations" / f"{stem}.xml"
        if PureWindowsPath(stem).name != stem or not path.is_file():
            raise InputError(f"names {stem!r}, which has no annotation", location=f"{file}:{number}")
        yield path


def _sample(path: Path, context: Context, from_zero: bool, taken: dict[Path, Path]) -> Sample:
    root = parse_xml(path, root="annotation")
    image = _image(root, path, context)
    first = taken.setdefault(image, path)
    if first != path:
        what = f"annotates {image.name}, as {first.name} does; both were read, each as a layout of its own"
        context.warnings.add("annotations of an image that has one already", str(path), what)
    stated = _stated_size(root, path)
    size = size_of(image, str(path), stated)
    if stated is None or 0 in stated:
        states = "no <size>" if stated is None else f"a <size> of {stated[0]:g} x {stated[1]:g}"
        what = f"states {states}; that of {image.name} was taken, {size[0]} x {size[1]}"
        context.warnings.add("annotations that state no size", str(path), what)

    def boxes() -> Iterator[RawBox]:
        for index, item in enumerate(root.findall("object"), start=1):
            location = f"{path}: object {index}"
            name = (item.findtext("name") or "").strip()
            if not name:
                raise InputError("has no <name>", location=location)
            corners = bounds(item, location)
            if corners is None:
                raise InputError("has no <bndbox>", location=location)
            left, top, right, bottom = corners
            if right == left or bottom == top:  # before the shift, which would make a pixel of it
                context.leave_out("boxes without area")
                continue
            shift = 0 if from_zero or right < left or bottom < top else 1
            yield RawBox(location, (left - shift, top - shift, right, bottom), name)

    return Sample(image, str(path), context.things(boxes(), "xyxy", unit="pixel", size=size))


def _image(root: Element, path: Path, context: Context) -> Path:
    """The file beside the annotation's own name; else the one that it names (which tools often leave stale)."""
    folder = context.images or context.src / "JPEGImages"
    named = PureWindowsPath((root.findtext("filename") or "").strip()).name
    candidates = [f"{path.stem}{suffix}" for suffix in SUFFIXES]
    if named:  # of two images of one stem, the one that is named
        candidates.insert(0 if PureWindowsPath(named).stem == path.stem else len(candidates), named)
    found = next((name for name in candidates if is_file(folder / name)), None)
    if found is None:
        raise MissingImageError(
            f"its image {named or path.stem + '.jpg'!r} is not in {folder.name}",
            location=str(path),
            hint="add it, or leave such records out with --skip-missing",
        )
    if named not in ("", found, path.stem):
        if PureWindowsPath(named).stem == path.stem:
            kind, why = "annotations that name another extension", "which is not there"
        else:
            kind = "annotations that name another image"
            why = f"which {'is there too' if is_file(folder / named) else 'is not there'}"
        context.warnings.add(kind, str(path), f"its <filename> is {named!r}, {why}; {found} was taken")
    elif found == named and PureWindowsPath(named).stem != path.stem:
        what = f"no image has its own name; the one of its <filename> was taken, {found}"
        context.warnings.add("annotations that are not named as their image", str(path), what)
    return folder / found


def _warn_of_leftovers(
    annotations: list[Path], splits: Mapping[str, Path], context: Context, taken: Mapping[Path, Path]
) -> None:
    """Warn of images that no annotation took, and of names in ImageSets that have no annotation."""
    stems = {path.stem for path in annotations}
    # The image of an annotation that could not be read is not without one.
    unread = stems - {path.stem for path in taken.values()}
    folder = context.images or context.src / "JPEGImages"
    for image in sorted(folder.iterdir()) if folder.is_dir() else ():
        if image.suffix in SUFFIXES and image not in taken and image.stem not in unread:
            context.warnings.add("images without annotation", str(image), "has no annotation; it was left out")
    for file in (splits[name] for name in sorted(splits)):
        for number, line in read_lines(file, what="list of a split"):
            stem, *member = line.split() or [""]
            if stem and member != ["-1"] and stem not in stems:
                what = f"names {stem!r}, which has no annotation; the line was passed over"
                context.warnings.add("names in ImageSets without annotation", f"{file}:{number}", what)


def _stated_size(root: Element, path: Path) -> tuple[float, float] | None:
    element = root.find("size")
    if element is None:
        return None
    location = f"{path}: size"
    return child_number(element, "width", location), child_number(element, "height", location)
