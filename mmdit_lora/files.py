"""Files: reading text as people have it, and writing so that nothing half-written is ever seen (temporary neighbour, fsync, rename)."""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmdit_lora.errors import InputError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def require_file(path: str | Path, *, what: str = "file", cure: str | None = None) -> Path:
    """`path`, which is a regular file or a link to one.

    Reading a FIFO waits for ever, and a device such as /dev/zero never ends: neither is ever opened.

    Args:
        what: what it should be, for the message, e.g. "layout file".

    Raises:
        InputError: there is no such file, or it is a folder, a FIFO, a device or a socket.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | ValueError)
        reason = f"no such {what}" if missing else f"cannot be read: {getattr(error, 'strerror', error)}"
        raise InputError(reason, where=str(path), cure=cure) from None
    if not stat.S_ISREG(mode):
        article = "an" if what[0] in "aeiou" else "a"
        raise InputError(
            f"is {kind_of(mode)}, not {article} {what}", where=str(path), cure=cure or "give a regular file"
        )
    return path


def inside(folder: str | Path, name: Any, *, where: str, what: str = "file") -> Path:
    """`folder / name`, for a name that stands in a file (an index, a list, an archive): it leads nowhere else.

    Args:
        where: the file that the name stands in. what: what it names, for the message.

    Raises:
        InputError: the name is no text, is empty, absolute, or holds `..`.
    """
    parts = PureWindowsPath(name).parts if isinstance(name, str) else ()  # both separators, and drives
    if not parts or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise InputError(
            f"names the {what} {name!r}", where=where, cure="give a relative path below the folder, without '..'"
        )
    return Path(folder) / name


def kind_of(mode: int) -> str:
    """What a `st_mode` stands for, for messages: "a folder", "a FIFO", ..."""
    kinds = {
        stat.S_ISREG: "a file",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISSOCK: "a socket",
        stat.S_ISLNK: "a link",
    }
    return next((name for test, name in kinds.items() if test(mode)), "no regular file")


def read_text(path: str | Path, *, what: str = "file", limit: int = 64 * 2**20, cure: str | None = None) -> str:
    """The text of a regular file: UTF-8 with or without a byte order mark, or UTF-16 with one (as Windows editors save).

    Args:
        what: see `require_file`. limit: the most bytes that are read.

    Raises:
        InputError: no regular file, larger than `limit`, or in another encoding, which is named where it can be told.
    """
    path = require_file(path, what=what, cure=cure)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(content) > limit:
        raise InputError(f"is larger than {limit / 2**20:g} MiB, the limit of a {what}", where=str(path))
    return decode_text(content, where=str(path))


def read_lines(
    path: str | Path, *, what: str = "file", longest: int = 64 * 2**20, cure: str | None = None
) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a text file that are not blank, read one at a time; encodings as of `read_text`.

    Lines end at newlines only, not at U+2028 and its kin, which JSON strings may hold.

    Args:
        longest: the most bytes of one line.

    Raises:
        InputError: no regular file, a line that is longer, or another encoding; with the line.
    """
    path = require_file(path, what=what, cure=cure)
    try:
        with path.open("rb") as file:
            wide = file.read(2) in _UTF16
            file.seek(0)
            lines = io.TextIOWrapper(file, encoding="utf-16", newline="\n") if wide else file
            for number in itertools.count(1):
                line = lines.readline(longest + 1)
                if not line:
                    return
                if len(line) > longest:
                    what_line = f"is longer than {longest / 2**20:g} MiB, the limit of a line"
                    raise InputError(what_line, where=f"{path}:{number}", cure="write one record a line")
                if isinstance(line, bytes):
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    line = decode_text(line, where=str(path), first_line=number)
                if line := line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"is not whole UTF-16 text ({error.reason})", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None


def decode_text(content: bytes, *, where: str, first_line: int = 1) -> str:
    """Bytes of a text file as text, without its byte order mark; see `read_text`.

    Args:
        first_line: number of the first line of `content`, for the message.

    Raises:
        InputError: the encoding is another one.
    """
    wide = content.startswith(_UTF16)
    try:
        return content.decode("utf-16") if wide else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if wide:
            raise InputError(f"is not whole UTF-16 text ({error.reason} at byte {error.start})", where=where) from None
        line = content[: error.start].count(b"\n") + first_line
        guess = "" if b"\0" in content else ", probably Windows-1252 (Latin-1)"
        raise InputError(
            f"is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}{guess}",
            where=where,
            cure="save it as UTF-8" if not guess else "save it as UTF-8 (iconv -f CP1252 -t UTF-8 OLD > NEW)",
        ) from None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o644)  # mkstemp gives 0600, which a shared folder's other readers could not open
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`.

    Before that its files are fsynced, then the folders that name them, the innermost first; after it the folder that names
    `path`: a power cut at any moment leaves the old one or the new one, whole.

    An existing folder at `path` is moved aside first and removed only after the rename, so that a crash never leaves
    nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        inside = sorted(temporary.rglob("*"), key=lambda found: len(found.parts), reverse=True)
        for found in [*(f for f in inside if f.is_file()), *(f for f in inside if f.is_dir()), temporary]:
            _fsync(found)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / "was")
        temporary.replace(path)
        _fsync(path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON to `path` atomically. NaN is refused: it is no JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def remove_temporaries(path: str | Path) -> None:
    """Remove what processes that were killed in `atomic_file` or `atomic_folder` for `path` left beside it.

    Only where nobody else writes `path` at this moment.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
