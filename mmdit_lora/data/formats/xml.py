"""XML from anyone, read without the traps of XML."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from mmdit_lora.data.formats.common import number
from mmdit_lora.errors import InputError
from mmdit_lora.files import decode_text, read_bytes

_LIMIT = 2**30  # bytes; CVAT writes a set as one file
_DECLARED = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z][\w.-]{0,40})[\"']")
_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")


def read_xml(path: Path) -> str:
    """The text of an XML file: by its byte order mark, else by the encoding that it declares, else UTF-8.

    Raises:
        InputError: no regular file, a huge one, or not in that encoding.
    """
    content = read_bytes(path, what="annotation file", limit=_LIMIT)
    if content.startswith(_BOMS):
        return decode_text(content, location=str(path))
    for encoding, start in (("utf-16-le", b"<\0"), ("utf-16-be", b"\0<")):
        if content.startswith(start):
            return _decoded(content, encoding, path)
    declared = _DECLARED.match(content)
    name = declared[1].decode() if declared else "utf-8"
    # A declaration that could be read byte by byte is of no wide encoding: such files were saved anew by another tool.
    if name.lower().replace("_", "-") in ("utf-8", "utf8") or name.lower().startswith(("utf-16", "utf-32", "ucs")):
        return decode_text(content, location=str(path))
    return _decoded(content, name, path)


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except LookupError:  # unknown, or no encoding of texts
        raise InputError(
            f"declares the encoding {encoding!r}, which is not known", location=str(path), hint="save it as UTF-8"
        ) from None
    except ValueError as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"is not in {encoding}, the encoding that it declares ({reason})",
            location=str(path),
            hint="save it as UTF-8",
        ) from None


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
        raise InputError("has a DTD (<!DOCTYPE ...>)", location=f"{path}:{parser.CurrentLineNumber}", hint="remove it")

    parser.StartDoctypeDeclHandler = refuse
    text = read_xml(path)
    try:
        parser.Parse(text, True)  # of a text, whatever it declares
        return builder.close()
    except expat.ExpatError as error:
        raise InputError(f"is not XML: {expat.ErrorString(error.code)}", location=f"{path}:{error.lineno}") from None
    except UnicodeEncodeError:  # half a character, which some encodings let through
        raise InputError("holds half a character", location=str(path), hint="save it as UTF-8") from None


def child_number(element: Element, tag: str, location: str) -> float:
    """The finite number in a child element. Raises `InputError` where there is none."""
    value = element.findtext(tag)
    if value is None:
        raise InputError(f"<{tag}> is missing", location=location, hint="give a number")
    try:
        return number(value, location)
    except InputError:
        raise InputError(f"<{tag}> is {value!r}", location=location, hint="give a number") from None


def attribute_number(element: Element, name: str, location: str) -> float:
    """The finite number in an attribute. Raises `InputError` where there is none."""
    try:
        return number(element.get(name), location)
    except InputError:
        raise InputError(
            f"{name} of <{element.tag}> is {element.get(name)!r}", location=location, hint="give a number"
        ) from None
