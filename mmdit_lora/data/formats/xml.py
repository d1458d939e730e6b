"""XML from anyone, read without the traps of XML; and CVAT's export for images, Flickr30k Entities."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from mmdit_lora.boxes import Four
from mmdit_lora.data.formats.common import Context, RawBox, Reads, Sample, number, points_box, read_text, size_of, text
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import decode_text, inside, read_bytes

_LIMIT = 2**30  # bytes; CVAT writes a set as one file
_DECLARED = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z][\w.-]{0,40})[\"']")
_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")
_ENTITY = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]+)\]")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_xml(path: Path) -> str:
    """The text of an XML file: by its byte order mark, else by the encoding that it declares, else UTF-8.

    Raises:
        InputError: no regular file, a huge one, or not in that encoding.
    """
    content = read_bytes(path, what="annotation file", limit=_LIMIT)
    if content.startswith(_BOMS):
        return decode_text(content, location=str(path))
    wide = {b"<\0": "utf-16-le", b"\0<": "utf-16-be"}.get(content[:2])
    declared = _DECLARED.match(content)
    name = wide or (declared[1].decode() if declared else "utf-8")
    # A declaration that could be read byte by byte is of no wide encoding: another tool has converted such files.
    if not wide and name.lower().replace("_", "-").startswith(("utf-8", "utf8", "utf-16", "utf-32", "ucs")):
        return decode_text(content, location=str(path))
    try:
        return content.decode(name)
    except LookupError:  # unknown, or no encoding of texts
        what = f"declares the encoding {name!r}, which is not known"
    except ValueError as error:
        what = f"is not in {name}, the encoding that it declares ({getattr(error, 'reason', error)})"
    raise InputError(what, location=str(path), hint="save it as UTF-8")


def parse_xml(path: Path, *, root: str | None = None) -> Element:
    """The root of an XML file; a DTD is refused, since entities can expand without bound or name other files.

    Args:
        root: the tag that it must have.

    Raises:
        InputError: the file cannot be read, is no XML, has a DTD or another root; with file and line.
    """
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: object) -> None:
        raise InputError("has a DTD (<!DOCTYPE ...>)", location=f"{path}:{parser.CurrentLineNumber}", hint="remove it")

    parser.StartDoctypeDeclHandler = refuse
    content = read_xml(path)
    try:
        parser.Parse(content, True)  # of a text, whatever it declares
        found: Element = builder.close()
    except expat.ExpatError as error:
        raise InputError(f"is not XML: {expat.ErrorString(error.code)}", location=f"{path}:{error.lineno}") from None
    except UnicodeEncodeError:  # half a character, which some encodings let through
        raise InputError("holds half a character", location=str(path), hint="save it as UTF-8") from None
    if root is not None and found.tag != root:
        raise InputError(f"its root is <{found.tag}>, not <{root}>", location=str(path))
    return found


def bounds(item: Element, location: str) -> Four | None:
    """The four numbers of an object's `bndbox`; None where it has none. Raises `InputError` where a number is missing."""
    box = item.find("bndbox")
    if box is None:
        return None
    left, top, right, bottom = (child_number(box, tag, location) for tag in _SIDES)
    return left, top, right, bottom


def child_number(element: Element, tag: str, location: str) -> float:
    """The finite number in a child element. Raises `InputError` where there is none."""
    value = element.findtext(tag)
    if value is None:
        raise InputError(f"<{tag}> is missing", location=location, hint="give a number")
    return _number(value, f"<{tag}>", location)


def _attribute(element: Element, name: str, location: str) -> float:
    return _number(element.get(name), f"{name} of <{element.tag}>", location)


def _number(value: str | None, what: str, location: str) -> float:
    try:
        return number(value, location)
    except InputError:
        raise InputError(f"{what} is {value!r}", location=location, hint="give a number") from None


def read_cvat(context: Context) -> Reads:
    """Images of an export "CVAT for images": annotations.xml. Boxes, polygons and polylines are in pixels, from 0.

    Raises:
        InputError: no XML, or another one. A record: no image, another size, a shape without label or numbers.
    """
    src, hint = context.src, "export 'CVAT for images', not 'for video'"
    path = src if src.is_file() else src / "annotations.xml"
    if not path.is_file():
        raise InputError("has no annotations.xml", location=str(src), hint="give the xml file itself, and --images")
    root = parse_xml(path, root="annotations")
    if root.find("track") is not None:
        raise InputError("holds tracks of a video", location=str(path), hint=hint)
    images = [image for image in root.findall("image") if context.split in (None, image.get("subset"))]
    if not images:
        raise InputError("holds no <image>", location=str(path), hint=hint)
    for index, image in enumerate(images):
        yield partial(_cvat_sample, image, f"{path}: image {image.get('id', index)}", context)


def _cvat_sample(image: Element, location: str, context: Context) -> Sample:
    file = context.image_finder.find(text(image.get("name"), "name", location), location)
    size = size_of(file, location, (image.get("width"), image.get("height")))

    def boxes() -> Iterator[RawBox]:
        for index, shape in enumerate(shape for shape in image if shape.tag != "tag"):
            place = f"{location}: {shape.tag} {index}"
            if shape.tag == "box":
                pixels = _turned(shape, place)
            elif shape.tag in ("polygon", "polyline"):
                pixels = points_box(_points(shape, place))
            else:
                context.leave_out(f"shapes of the kind {shape.tag}")
                continue
            label = text(shape.get("label"), "label", place)
            yield RawBox(place, pixels, label, around=bool(shape.get("rotation")))

    return Sample(file, location, context.things(boxes(), "xyxy", unit="pixel", size=size))


def _turned(shape: Element, location: str) -> Four:
    """The upright box around a box that is turned about its middle."""
    left, top, right, bottom = (_attribute(shape, name, location) for name in ("xtl", "ytl", "xbr", "ybr"))
    angle = math.radians(_attribute(shape, "rotation", location)) if shape.get("rotation") else 0
    if not angle or right < left or bottom < top:
        return left, top, right, bottom
    cos, sin, across, down = abs(math.cos(angle)), abs(math.sin(angle)), right - left, bottom - top
    half_x, half_y = (across * cos + down * sin) / 2, (across * sin + down * cos) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half_x, y - half_y, x + half_x, y + half_y


def _points(shape: Element, location: str) -> list[tuple[float, float]]:
    try:
        return [(float(x), float(y)) for x, y in (p.split(",") for p in (shape.get("points") or "").split(";"))]
    except ValueError:
        what = f"points is {shown(shape.get('points'))}"
        raise InputError(what, location=location, hint="write x,y;x,y;...") from None


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
    stems = sorted(path.stem for path in (src / "Sentences").glob("*.txt"))
    if split is not None:
        listing = src / f"{split}.txt"
        if not listing.is_file():
            raise InputError(f"has no {split}.txt", location=str(src), hint="leave --split away")
        stems = read_text(listing).split()
        for stem in stems:
            inside(src, stem, location=str(listing), what="image")
    for stem in stems:
        yield partial(_flickr30k, stem, context)


def _flickr30k(stem: str, context: Context) -> Sample:
    file, path = context.src / "Sentences" / f"{stem}.txt", context.src / "Annotations" / f"{stem}.xml"
    location = f"{file}:1"
    sentence = read_text(file).split("\n")[0].strip()
    root = parse_xml(path)
    image = context.image_finder.find(f"{stem}.jpg", location)
    size = size_of(image, location)
    chains: defaultdict[str, list[Four]] = defaultdict(list)
    for index, item in enumerate(root.findall("object"), start=1):
        place = f"{path}: object {index}"
        corners = bounds(item, place)
        if corners is None:  # of the scene as a whole, or of nothing visible
            continue
        left, top, right, bottom = corners
        xyxy = context.box((left - 1, top - 1, right, bottom), "xyxy", place, unit="pixel", size=size)
        for name in item.findall("name"):
            if xyxy is not None:
                chains[(name.text or "").strip()].append(xyxy)
    entities = _ENTITY.findall(sentence)
    if unboxed := sum(chain not in chains for chain, _ in entities):
        context.left_out["phrases without a box"] += unboxed
    things = [(phrase, box) for chain, phrase in entities for box in chains.get(chain, [])]
    return Sample(image, location, things, text(_ENTITY.sub(r"\2", sentence), "the sentence", location))
