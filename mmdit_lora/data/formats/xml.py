"""XML from anyone, read without the traps of XML."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from mmdit_lora.data.formats.common import number
from mmdit_lora.errors import InputError


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
        raise InputError("has a DTD (<!DOCTYPE ...>)", where=f"{path}:{parser.CurrentLineNumber}", cure="remove it")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except expat.ExpatError as error:
        raise InputError(f"is not XML: {expat.ErrorString(error.code)}", where=f"{path}:{error.lineno}") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from None


def child_number(element: Element, tag: str, where: str) -> float:
    """The finite number in a child element. Raises `InputError` where there is none."""
    value = element.findtext(tag)
    if value is None:
        raise InputError(f"<{tag}> is missing", where=where, cure="give a number")
    try:
        return number(value, where)
    except InputError:
        raise InputError(f"<{tag}> is {value!r}", where=where, cure="give a number") from None


def attribute_number(element: Element, name: str, where: str) -> float:
    """The finite number in an attribute. Raises `InputError` where there is none."""
    try:
        return number(element.get(name), where)
    except InputError:
        raise InputError(
            f"{name} of <{element.tag}> is {element.get(name)!r}", where=where, cure="give a number"
        ) from None
