"""Pascal VOC in: JPEGImages, Annotations (one XML a picture) and, where there are any, splits in ImageSets/Main.

VOC counts pixels from 1 and includes the last one, so a box covers xmin - 1 .. xmax. Many tools that write VOC count from
0, and their sets give themselves away by a 0 somewhere: then nothing is subtracted.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from mmdit_lora.data.images import image_size
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.layout import Box, Layout

DEFAULT_CAPTION = "a photo of {phrases}"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")
_ZERO = re.compile(rb"<[xy]min>\s*0+(\.0*)?\s*</")
# A box may leave its picture by this share of the side before it is a mistake rather than a sloppy edge.
_OUTSIDE = 0.25


@dataclass(frozen=True)
class VocSet:
    """What was read.

    Args:
        left_out: how often something was left out, by reason.
        errors: annotations that could not be read; empty unless they were asked for.
        from_zero: whether pixels were counted from 0.
        splits: names of the splits that the folder has.
    """

    records: list[Record]
    left_out: Mapping[str, int]
    from_zero: bool
    splits: tuple[str, ...]
    errors: list[InputError] = field(default_factory=list)


def read_voc(
    src: str | Path,
    split: str | None = None,
    *,
    caption: str = DEFAULT_CAPTION,
    phrases: Mapping[str, str] | None = None,
) -> list[tuple[Path, Layout]]:
    """(picture, layout) of a VOC folder; the arguments and errors of `scan_voc`."""
    return [(r.image, r.layout) for r in scan_voc(src, split, caption=caption, phrases=phrases).records]


def scan_voc(
    src: str | Path,
    split: str | None = None,
    *,
    caption: str = DEFAULT_CAPTION,
    phrases: Mapping[str, str] | None = None,
    collect_errors: bool = False,
) -> VocSet:
    """Read a VOC folder. Boxes are clipped to the picture; empty ones, and pictures that have no box, are left out and counted.

    Args:
        split: a name in ImageSets/Main; None = every annotation, in the order of their names.
        caption: template of the captions; `{phrases}` are the distinct phrases of the picture, in their order.
        phrases: class name -> phrase; else a class is its own phrase, in lower case.
        collect_errors: return the errors of single annotations instead of raising the first.

    Raises:
        InputError: the folder or the split does not exist, an XML file is damaged, has a DTD, or names no picture or a
            picture of another size; the template has another placeholder; `phrases` names no class of the set.
    """
    src, phrases = Path(src), phrases or {}
    check_caption(caption)
    annotations, splits = _annotations(src), _splits(src)
    from_zero = any(_ZERO.search(path.read_bytes()) for path in annotations)
    records: list[Record] = []
    errors: list[InputError] = []
    left_out: Counter[str] = Counter()
    classes: set[str] = set()
    for path in annotations if split is None else _of_split(src, split, splits):
        try:
            image, objects = _read_annotation(path, src, from_zero, left_out)
        except InputError as error:
            if not collect_errors:
                raise
            errors.append(error)
            continue
        classes.update(name for name, _ in objects)
        boxes = tuple(Box(xyxy=xyxy, phrase=phrases.get(name, name.lower())) for name, xyxy in objects)
        if not boxes:
            left_out["pictures without a box"] += 1
            continue
        text = caption.format(phrases=", ".join(dict.fromkeys(box.phrase for box in boxes)))
        records.append(Record(image=image, layout=Layout(caption=text, boxes=boxes), where=str(path)))
    for name in phrases:
        if name not in classes and not errors:
            raise unknown_key(name, sorted(classes), where="--map")
    return VocSet(records, dict(left_out), from_zero, tuple(sorted(splits)), errors)


def check_caption(template: str) -> None:
    """Refuse a caption template with another placeholder than `{phrases}`.

    Raises:
        InputError: another placeholder, or a brace alone.
    """
    cure = "the one placeholder is {phrases}; write {{ and }} for braces"
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"the caption template {template!r} is wrong: {error}", where="--caption", cure=cure) from None
    for name, spec, how in fields:
        if name != "phrases" or spec or how:
            raise InputError(f"the caption template has the placeholder {{{name}}}", where="--caption", cure=cure)
    if not template.strip():
        raise InputError("the caption template is empty", where="--caption", cure=cure)


def _annotations(src: Path) -> list[Path]:
    if not src.is_dir():
        raise InputError("no such folder", where=str(src), cure="give a VOC folder: JPEGImages, Annotations")
    for name in ("Annotations", "JPEGImages"):
        if not (src / name).is_dir():
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


def _read_annotation(
    path: Path, src: Path, from_zero: bool, left_out: Counter[str]
) -> tuple[Path, list[tuple[str, tuple[float, float, float, float]]]]:
    root = parse_xml(path)
    if root.tag != "annotation":
        raise InputError(f"its root is <{root.tag}>, not <annotation>", where=str(path))
    image = _picture(root, path, src)
    try:
        width, height = image_size(image)
    except InputError as error:
        raise error.at(str(path)) from None
    _check_size(root, path, (width, height))
    objects = []
    for number, item in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise InputError("has no <name>", where=where)
        box = item.find("bndbox")
        if box is None:
            raise InputError("has no <bndbox>", where=where)
        left, top, right, bottom = (_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax"))
        if right < left or bottom < top:
            raise InputError(f"the box {[left, top, right, bottom]} is inverted", where=where, cure="swap min and max")
        if right == left or bottom == top:
            left_out["boxes without area"] += 1
            continue
        shift = 0 if from_zero else 1
        xyxy = _clipped((left - shift, top - shift, right, bottom), width, height, where)
        if xyxy is None:
            left_out["boxes outside their picture"] += 1
        else:
            objects.append((name, xyxy))
    return image, objects


def _clipped(
    pixels: tuple[float, float, float, float], width: int, height: int, where: str
) -> tuple[float, float, float, float] | None:
    """The box relative to the picture, clipped to it; None where nothing is left of it."""
    left, top, right, bottom = (v / side for v, side in zip(pixels, (width, height) * 2, strict=True))
    if max(right, bottom) > 1 + _OUTSIDE or min(left, top) < -_OUTSIDE:
        raise InputError(
            f"the box {[round(v, 1) for v in pixels]} leaves the picture of {width} x {height} pixels by far",
            where=where,
            cure="check that the annotation belongs to this picture, and to this size of it",
        )
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _picture(root: Element, path: Path, src: Path) -> Path:
    """The file beside the annotation's own name; else the one that it names (which tools often leave stale)."""
    named = PureWindowsPath((root.findtext("filename") or "").strip()).name
    candidates = [f"{path.stem}{suffix}" for suffix in _SUFFIXES] + ([named] if named else [])
    for name in candidates:
        if (src / "JPEGImages" / name).is_file():
            return src / "JPEGImages" / name
    raise InputError(f"its picture {named or path.stem + '.jpg'!r} is not in JPEGImages", where=str(path))


def _check_size(root: Element, path: Path, size: tuple[int, int]) -> None:
    element = root.find("size")
    if element is None:
        return
    said = (_number(element, "width", f"{path}: size"), _number(element, "height", f"{path}: size"))
    if 0 not in said and said != size:  # some tools write 0 x 0
        raise InputError(
            f"says {said[0]:g} x {said[1]:g} pixels, the picture has {size[0]} x {size[1]} (upright)",
            where=str(path),
            cure="annotate the picture as it is, or remove <size> if the boxes are right",
        )


def _number(element: Element, tag: str, where: str) -> float:
    text = element.findtext(tag)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"<{tag}> is {'missing' if text is None else repr(text)}", where=where, cure="give a number")
    return number


def parse_xml(path: Path) -> Element:
    """The root of an XML file; a DTD is refused, since entities can expand without bound or name other files.

    Raises:
        InputError: the file cannot be read, is no XML, or has a DTD; with file and line.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: object) -> None:
        raise InputError(
            "has a DTD (<!DOCTYPE ...>)", where=f"{path}:{parser.CurrentLineNumber}", cure="remove it: VOC needs none"
        )

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except expat.ExpatError as error:
        raise InputError(f"is not XML: {expat.ErrorString(error.code)}", where=f"{path}:{error.lineno}") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from None
