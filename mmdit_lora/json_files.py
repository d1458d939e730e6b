"""Reading JSON: others' files, and what the program wrote for itself; with the line of what is wrong."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import read_text

Value = TypeVar("Value", bound=dict[str, Any] | list[Any])
JSON_LIMIT = 4 * 2**30  # bytes; the largest annotation files of published sets have half of that
_OBJECT_LIMIT = 64 * 2**20  # of configs, indices, states
_DEEPEST = 100  # objects and lists in each other; nobody's config has a tenth of that
log = logging.getLogger(__name__)


def read_json(path: str | Path, *, what: str = "JSON file", limit: int = JSON_LIMIT, hint: str | None = None) -> Any:
    """The content of a JSON file.

    Args:
        what, limit, hint: as of `files.read_text`.

    Raises:
        InputError: it is no regular file, too large, not text or not JSON; with the line.
    """
    return parse_json(read_text(path, what=what, limit=limit, hint=hint), location=str(path), hint=hint)


def read_object(
    path: str | Path,
    *,
    what: str = "JSON file",
    limit: int = _OBJECT_LIMIT,
    hint: str | None = None,
    finite: bool = True,
) -> dict[str, Any]:
    """The one object of a JSON file: a config, an index, a state. Raises `InputError` as `parse_object` does."""
    text = read_text(path, what=what, limit=limit, hint=hint)
    return parse_object(text, location=str(path), hint=hint, finite=finite)


def parse_object(text: str, *, location: str, hint: str | None = None, finite: bool = True) -> dict[str, Any]:
    """The one object of a JSON text. Raises `InputError` as `parse_json` does, for another value, and for deep nesting."""
    return _shallow(parse_json(text, location=location, hint=hint, finite=finite), dict, location, hint)


def read_cached(path: str | Path, kind: type[Value]) -> Value | None:
    """JSON that the program wrote for itself and can make again; None if there is none or, with a warning, if it is damaged.

    Args:
        kind: dict or list.
    """
    if not Path(path).exists():
        return None
    try:
        return _shallow(read_json(path, limit=_OBJECT_LIMIT), kind, str(path), None)
    except InputError as error:
        warn_damaged(path, error.what)
        return None


def warn_damaged(path: str | Path, why: object) -> None:
    """Log that a file which the program wrote for itself cannot be used."""
    log.warning("%s is damaged and made anew (%s)", path, clip(why))


def _shallow(value: Any, kind: type[Value], location: str, hint: str | None) -> Value:
    """`value`, which is a `kind` and is nested in at most `_DEEPEST` levels."""
    if not isinstance(value, kind):
        name = "object" if kind is dict else "list"
        raise InputError(f"holds {type(value).__name__}, not a JSON {name}", location=location, hint=hint)
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return value
    raise InputError("is nested too deeply", location=location, hint=hint)


def read_rows(path: Path, *, what: str, hint: str | None = None) -> list[dict[str, Any]]:
    """The objects of a file to which the program adds lines, NaN and Infinity allowed; an incomplete last line is left out.

    Raises:
        InputError: a line is no object.
    """
    if not path.exists():
        return []
    text = read_text(path, what=what, limit=JSON_LIMIT)
    lines = numbered_lines(text[: text.rfind("\n") + 1])
    return [parse_object(line, location=f"{path}:{number}", hint=hint, finite=False) for number, line in lines]


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines of `text` that are not blank, with their numbers from 1.

    Split at newlines only: `str.splitlines` would also split at U+2028 and its kin, which JSON strings may hold.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def parse_json(text: str, *, location: str, hint: str | None = None, finite: bool = True) -> Any:
    """`json.loads` that refuses NaN, Infinity and a key that stands twice in an object, and reports the place.

    Args:
        finite: false = NaN and Infinity are read.

    Raises:
        InputError: with the line and column inside `text`.
    """
    if not text.strip():
        raise InputError("is empty", location=location, hint=hint)
    with json_errors(location, many_lines="\n" in text.strip(), hint=hint):
        try:
            return (UNIQUE if finite else _WITH_NAN).decode(text)
        except TwiceError as error:
            line = _line_of_second(text, error.key) if "\n" in text.strip() else None
            raise error.at(f"{location}:{line}") if line else error from None
    raise AssertionError("unreachable")


@contextmanager
def json_errors(location: str, *, many_lines: bool = False, hint: str | None = None) -> Iterator[None]:
    """Within it, what a decoder raises becomes an `InputError` with its place."""
    try:
        yield
    except json.JSONDecodeError as error:
        place = f"{location}:{error.lineno}" if many_lines else location
        what = f"is not JSON: {error.msg} (column {error.colno})"
        if error.msg == "Extra data" and error.doc[: error.pos].rstrip(" \t").endswith("\r"):
            hint = "its lines end in CR alone: save it with LF line ends (tr '\\r' '\\n' < OLD > NEW)"
        raise InputError(what, location=place, hint=hint) from None
    except InputError as error:
        raise error if (error.location or "").startswith(location) else error.at(location) from None
    except ValueError as error:  # an int of thousands of digits
        what = f"is not JSON that can be read: {str(error).split(';')[0]}"
        raise InputError(what, location=location, hint=hint) from None
    except RecursionError:
        raise InputError("is nested too deeply", location=location, hint=hint) from None


def _refuse_constant(name: str) -> float:
    raise InputError(f"holds {name}", hint="write a finite number")


class TwiceError(InputError):
    """A key stands twice in one object."""

    key = ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        key = next(name for index, name in enumerate(names) if name in names[:index])
        error = TwiceError(f"the key {clip(repr(key), 100)} stands twice", hint="keep one of the two")
        error.key = key
        raise error
    return value


def _line_of_second(text: str, key: str) -> int | None:
    """The line where a key stands the second time in one object, for JSON whose inner and outer objects share no key."""
    before = 0  # how often it stands in objects that end earlier

    def count(pairs: list[tuple[str, Any]]) -> None:
        nonlocal before
        _once(pairs)
        before += any(name == key for name, _ in pairs)

    with suppress(TwiceError):
        json.loads(text, object_pairs_hook=count)
    places = [found.start() for found in re.finditer(rf'(?<!\\)"{re.escape(key)}"\s*:', text)]
    return text.count("\n", 0, places[before + 1]) + 1 if len(places) > before + 1 else None


UNIQUE = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)
_WITH_NAN = json.JSONDecoder(object_pairs_hook=_once)
