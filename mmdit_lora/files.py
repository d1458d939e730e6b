"""Reading text files in the encodings of editors, and writing files and folders atomically (temporary name, fsync, rename)."""

from __future__ import annotations

import codecs
import ctypes
import difflib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmdit_lora.errors import InputError, Stopped, clip, shown
from mmdit_lora.locks import start_of

# Prefix of every temporary file, folder and lock: <RESERVED><of what>-<pid>-<its start>-<random>. No user's file has such a
# name, and it says which process wrote it.
RESERVED = ".mmdit_lora-"
_TEMPORARY = re.compile(re.escape(RESERVED) + r"[0-9a-f]+-(\d+)-(\d+)-[0-9a-f]{8}(\.\w*)?")
_LOCK_NAME = re.compile(re.escape(RESERVED) + r"(lock|[0-9a-f]+\.lock)")
_SURROGATES = re.compile("[\ud800-\udfff]+")
_OLD = "was"  # in a temporary folder: what was moved aside, under its own name

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_MOST_WIDE = 2**30  # bytes of a UTF-16 file that is read line by line


def require_file(path: str | Path, *, what: str = "file", hint: str | None = None) -> Path:
    """`path`, which is a regular file or a link to one.

    Neither a FIFO, which blocks, nor a device such as /dev/zero, which never ends, is ever opened.

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
        raise InputError(reason, location=str(path), hint=hint) from None
    if not stat.S_ISREG(mode):
        wrong = f"is {kind_of(mode)}, not {'an' if what[0] in 'aeiou' else 'a'} {what}"
        raise InputError(wrong, location=str(path), hint=hint or "give a regular file")
    return path


def inside(folder: str | Path, name: Any, *, location: str, what: str = "file") -> Path:
    """`folder / name` for a name read from a file (an index, a list, an archive), which must lie in `folder`.

    Args:
        location: the file that holds the name. what: what it names, for the message.

    Raises:
        InputError: the name is not a string, is empty or absolute, or contains `..`.
    """
    parts = PureWindowsPath(name).parts if isinstance(name, str) else ()  # both separators, and drives
    if not parts or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        hint = "give a relative path below the folder, without '..'"
        raise InputError(f"names the {what} {shown(name)}", location=location, hint=hint)
    return Path(folder) / name


def public_name(base: str | Path) -> str:
    """The name of a base in files that are shared: a hub id as it is, a folder by its last part, no path of this machine."""
    text = str(base)
    if not written_as_path(text) and not exists(text):
        return text
    name = PureWindowsPath(text).name if "\\" in text or text[1:2] == ":" else Path(text).name
    return name if name.strip(".") else Path(text).resolve().name or "base"


def exists(path: str | Path) -> bool:
    """Whether something is at `path`; False for a name that no file can have (too long, or with a NUL)."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def written_as_path(base: str) -> bool:
    """Whether a base's name can only be a path: a hub id has at most one "/"."""
    return "\\" in base or base[1:2] == ":" or base.startswith(("/", ".", "~")) or base.count("/") > 1


def nearest(path: str | Path) -> Path | None:
    """The existing path most like `path`, which has a misspelt part; None if there is none."""
    parts = Path(path).parts
    found = Path(parts[0]) if parts and Path(parts[0]).is_absolute() else Path()
    for part in parts[1:] if found.parts else parts:
        if exists(found / part):
            found /= part
            continue
        try:
            names = sorted(entry.name for entry in found.iterdir())
        except OSError:
            return None
        near = difflib.get_close_matches(part[:255], names, n=1, cutoff=0.6)
        if not near:
            return None
        found /= near[0]
    return found if found.parts else None


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def kind_of(mode: int) -> str:
    """What a `st_mode` stands for, for messages: "a folder", "a FIFO", ..."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def read_text(path: str | Path, *, what: str = "file", limit: int = 64 * 2**20, hint: str | None = None) -> str:
    """The text of a regular file: UTF-8 with or without a byte order mark, or UTF-16 with one (as Windows editors save).

    Args:
        what: see `require_file`. limit: the most bytes that are read.

    Raises:
        InputError: the file is not regular, is larger than `limit`, or has another encoding, which is named if known.
    """
    return decode_text(read_bytes(path, what=what, limit=limit, hint=hint), location=str(path))


def read_bytes(path: str | Path, *, what: str = "file", limit: int, hint: str | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `InputError` as `read_text` does."""
    path = require_file(path, what=what, hint=hint)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", location=str(path)) from None
    if len(content) > limit:
        raise InputError(f"is larger than {limit / 2**20:g} MiB, the limit of a {what}", location=str(path))
    return content


def read_lines(
    path: str | Path, *, what: str = "file", longest: int = 64 * 2**20, hint: str | None = None
) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a text file that are not blank, read one at a time; encodings as of `read_text`.

    Lines end at newlines only, not at U+2028 and its kin, which JSON strings may hold.

    Args:
        longest: the most bytes of one line.

    Raises:
        InputError: no regular file, a line that is longer, or another encoding; with the line.
    """
    path = require_file(path, what=what, hint=hint)
    try:
        with path.open("rb") as file:
            wide = file.peek(4).startswith((*_UTF32, *_UTF16))
            lines = io.BytesIO(read_text(path, what=what, limit=_MOST_WIDE).encode()) if wide else file
            for number in itertools.count(1):
                line = lines.readline(longest + 1)
                if not line:
                    return
                if len(line) > longest:
                    too_long = f"is longer than {longest / 2**20:g} MiB, the limit of a line"
                    raise InputError(too_long, location=f"{path}:{number}", hint="write one record a line")
                if text := decode_text(line, location=str(path), first_line=number).strip():
                    yield number, text
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", location=str(path)) from None


def decode_text(content: bytes, *, location: str, first_line: int = 1) -> str:
    """Bytes of a text file as text, without its byte order mark; see `read_text`.

    Args:
        first_line: number of the first line of `content`, for the message.

    Raises:
        InputError: the encoding is another one.
    """
    hint = "save it as UTF-8"
    if content.startswith(_UTF32):  # before UTF-16, whose mark the one of UTF-32 begins with
        raise InputError("is UTF-32 text", location=location, hint=f"{hint} (iconv -f UTF-32 -t UTF-8 OLD > NEW)")
    wide = content.startswith(_UTF16)
    if not wide and (nul := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, nul) + first_line
        what = f"holds a NUL in line {line}, as UTF-16 or UTF-32 without a byte order mark does"
        raise InputError(what, location=location, hint=hint)
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if wide:
            what = f"is not whole UTF-16 text ({error.reason} at byte {error.start})"
            raise InputError(what, location=location) from None
        line = content.count(b"\n", 0, error.start) + first_line
        what = f"is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}, probably Windows-1252 (Latin-1)"
        hint += " (iconv -f CP1252 -t UTF-8 OLD > NEW)"
        raise InputError(what, location=location, hint=hint) from None


@contextmanager
def atomic_file(path: str | Path, *, label: str | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on any error it is removed.

    The umask decides who may read it. A link is followed.

    Args:
        label: of the temporary file's name, in place of one made from `path`.

    Raises:
        InputError: `path` is a folder, or neither file nor folder; or it cannot be written (no space, no right, ...).
    """
    path = output_path(path, folder=False)
    with os_errors_as_input_errors(path):
        made = make_folders(path.parent)
        temporary = _temporary(path, label)

        def undo() -> None:
            temporary.unlink(missing_ok=True)
            remove_empty(made)

        with undone_at_end(undo):
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors writes 0600
                temporary.chmod(mode)
            _fsync(temporary)
            if path.parent in before_replacing:
                before_replacing[path.parent](temporary, path)
            temporary.replace(path)


@contextmanager
def atomic_folder(path: str | Path, *, before_swap: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, whatever is there.

    Before that its files are fsynced, then the folders that name them, the innermost first; after it the folder that names
    `path`: a power cut at any moment leaves the old one or the new one, whole. So does a kill: the two change places in one
    step where the system has one (Linux: renameat2). Elsewhere the old one is moved aside first, and `remove_temporaries`
    puts it back if nothing took its place.

    Args:
        before_swap: called with the temporary folder when it is complete; what it raises leaves `path` as it is.

    Raises:
        InputError: `path` is no folder, or cannot be written (no space, no right, ...).
    """
    path = output_path(path, folder=True)
    with os_errors_as_input_errors(path):
        made = make_folders(path.parent)
        temporary = _temporary(path)

        def undo() -> None:
            for moved in path.parent.glob(f"{RESERVED}{tag_of(path.name)}-{os.getpid()}-*/{_OLD}"):
                _put_back(moved.parent)
            shutil.rmtree(temporary, ignore_errors=True)
            remove_empty(made)

        with undone_at_end(undo):
            temporary.mkdir()
            yield temporary
            _set_modes(temporary)
            if before_swap is not None:
                before_swap(temporary)
            inside = sorted(temporary.rglob("*"), key=lambda file: (file.is_dir(), -len(file.parts)))
            for file in [*(each for each in inside if each.is_file() or each.is_dir()), temporary]:
                _fsync(file)
            _swap(temporary, path)
            _fsync(path.parent)


def output_path(path: str | Path, *, folder: bool) -> Path:
    """`path` without links, which is absent or of the kind that is to be written, below folders.

    Raises:
        InputError: it is something else (a FIFO, a device, a dangling link, ...), lies below a file, or is no possible name;
            or a file is to be written, and it ends as folders do.
    """
    given, hint = Path(path), "give another name"
    if not folder and os.path.basename(path) in ("", "."):  # noqa: PTH119 - which `Path` drops
        raise InputError("names a folder, and one file is written", location=clip(path), hint="give a file's name")
    try:
        for place in (given, *given.absolute().parents):
            if place.exists():
                break
            if place.is_symlink():
                with suppress(FileNotFoundError):
                    place.stat()  # raises if links form a circle
                raise InputError("is a dangling link", location=str(place), hint="remove the link, or " + hint)
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(_reason(error), location=clip(given), hint=hint) from None
    is_file = place is given and not folder
    if not (stat.S_ISREG if is_file else stat.S_ISDIR)(mode):
        kind = "file" if is_file else "folder"
        raise InputError(f"is {kind_of(mode)}, not a {kind}", location=str(place), hint=hint)
    return Path(os.path.realpath(given))


def is_reserved(name: str) -> bool:
    """Whether this is the name of a temporary or a lock; a user's `.mmdit_lora-notes` is neither."""
    return bool(_TEMPORARY.fullmatch(name) or _LOCK_NAME.fullmatch(name))


def make_folders(path: Path) -> list[Path]:
    """Make `path` and what is missing above it; returns what was made, the innermost first."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty, in order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def remove_temporaries(path: str | Path) -> list[str]:
    """Finish or undo what processes that died in `atomic_file` or `atomic_folder` for `path` left beside it.

    What a live process writes is left alone.

    Returns:
        What was done, as sentences; empty if there was nothing to do.
    """
    path = Path(path)
    return _clean(path.parent, f"{RESERVED}{tag_of(path.name)}-*")


def remove_all_temporaries(folder: str | Path) -> list[str]:
    """As `remove_temporaries`, for whatever was to be written in `folder` or below it."""
    places = {path.parent for path in Path(folder).rglob(f"{RESERVED}*-*")}
    return [line for place in sorted(places) for line in _clean(place, f"{RESERVED}*-*")]


def remove_folder(folder: Path) -> None:
    """Remove a folder, under a temporary's name: a kill halfway leaves nothing with its name."""
    hidden = _temporary(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def abandon() -> list[str]:
    """Remove what this process is writing and has not finished: for a process that ends at once.

    Returns:
        What the user should know, in words.
    """
    hints = []
    while _pending:
        with suppress(OSError, ValueError):
            hint = _pending.pop()()
            hints += [hint] if hint else []
    return hints


@contextmanager
def undone_at_end(undo: Callable[[], str | None]) -> Iterator[None]:
    """Call `undo` at the end of the block, however it ends; or in `abandon`, where it may return a hint for the user."""
    _pending.append(undo)
    try:
        yield
    finally:
        if undo in _pending:
            _pending.remove(undo)
        with suppress(OSError, InputError):
            undo()


def space_error(error: BaseException | None) -> int | None:
    """The errno of an error that means lack of space, also of one that a library has wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error.errno
        text = str(error)
        for number in NO_SPACE:
            if f"os error {number})" in text:  # as Rust's libraries write it, safetensors among them
                return number
        error = error.__cause__ or error.__context__
    return None


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REASONS = {
    errno.ENOSPC: ("no space is left on the disk", "free some space, or give another place"),
    errno.EDQUOT: ("the quota of the disk is used up", "free some space, or give another place"),
    errno.EFBIG: ("a file would be larger than is allowed there", "give another place"),
    errno.EROFS: ("the file system is read-only", "give another place"),
    errno.EACCES: ("you have no right to write there", "give another place"),
    errno.EPERM: ("you have no right to write there", "give another place"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.ELOOP: ("the links lead round in a circle", "give another place"),
    errno.ENOTDIR: ("a part of the path is a file", "give another place"),
    errno.EBUSY: ("is in use, as a mount point is", "give a folder in it"),
}
# Folder -> what `atomic_file` calls, with the temporary and the path, before a whole file takes its name there.
before_replacing: dict[Path, Callable[[Path, Path], None]] = {}
# Undone by `abandon`, the last one first.
_pending: list[Callable[[], str | None]] = []


@contextmanager
def os_errors_as_input_errors(path: Path) -> Iterator[None]:
    """Within it, the system's refusal to write `path` becomes an `InputError`."""
    try:
        yield
    except (InputError, Stopped):
        raise
    except Exception as error:
        number = space_error(error)
        if number is None and isinstance(error, OSError) and error.errno in _REASONS and _concerns(error, path):
            number = error.errno
        if number is None:
            raise
        reason, hint = _REASONS[number]
        raise InputError(f"cannot be written: {reason}", location=clip(path, 300), hint=hint) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error names `path`, a temporary of it or what is below them, or a folder above."""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return any(RESERVED in str(name) or name.is_relative_to(path) or path.is_relative_to(name) for name in names)


def _reason(error: OSError | ValueError) -> str:
    """Why a path cannot be written, for a message."""
    known = _REASONS.get(getattr(error, "errno", None) or 0)
    return f"cannot be written: {known[0] if known else getattr(error, 'strerror', None) or error}"


def tag_of(name: str) -> str:
    """What stands for a file's or folder's name in the names of its temporaries and lock."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


def _temporary(path: Path, label: str | None = None) -> Path:
    """A free name beside `path` that also says who writes it."""
    pid = os.getpid()
    suffix = path.suffix if re.fullmatch(r"\.\w{1,15}", path.suffix) else ""
    name = f"{RESERVED}{label or tag_of(path.name)}-{pid}-{start_of(pid) or 0}-{secrets.token_hex(4)}{suffix}"
    return path.with_name(name)


def _clean(folder: Path, pattern: str) -> list[str]:
    done: dict[str, None] = {}
    for left in folder.glob(pattern) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(left.name)
        if match is None or start_of(int(match[1])) == int(match[2]):
            continue
        who = f"process {match[1]}, which was killed"
        if left.is_dir() and not left.is_symlink():
            done |= {f"put {old} back, which {who}, had moved aside": None for old in _put_back(left)}
        else:
            left.unlink(missing_ok=True)
        done[f"removed what {who}, left half-written in {folder}"] = None
    return list(done)


def _put_back(temporary: Path) -> list[Path]:
    """Undo the first of the two renames of `_swap`, and remove the temporary folder."""
    moved = [old for old in (temporary / _OLD).glob("*") if not (temporary.parent / old.name).exists()]
    back = [old.rename(temporary.parent / old.name) for old in moved]
    shutil.rmtree(temporary, ignore_errors=True)
    return back


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, and remove what was there."""
    if not path.exists() or not any(path.iterdir()):
        new.rename(path)  # fails where somebody put something there meanwhile
        return
    if _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
        return
    aside = _temporary(path)
    (aside / _OLD).mkdir(parents=True)
    path.rename(aside / _OLD / path.name)
    new.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return bool(rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _set_modes(folder: Path) -> None:
    """What the umask gives, which it gave `folder` itself: libraries write 0600, and copies keep the modes of others."""
    own = stat.S_IMODE(folder.stat().st_mode)
    for found in folder.rglob("*"):
        if found.is_symlink():
            continue
        mode = own if found.is_dir() else own & 0o666
        if stat.S_IMODE(found.stat().st_mode) != mode:
            found.chmod(mode)


def printable(text: str) -> str:
    """`text` as UTF-8 can hold it. Python keeps the bytes of a path that are no text (in a C locale, all beyond ASCII) as
    lone surrogates: here they are the text that they spell, or `\\xff`."""

    def spelt(found: re.Match[str]) -> str:
        try:
            return found[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # half a character, from elsewhere
            return found[0].encode("ascii", "backslashreplace").decode()

    return _SURROGATES.sub(spelt, text)


def json_text(data: Any, *, indent: int | None = None) -> str:
    """`data` as JSON that UTF-8 can hold; NaN is refused: it is no JSON. Bytes of a path that are no text are escaped, so that
    Python reads the same path back."""
    text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def write_text(path: str | Path, text: str) -> None:
    """Write `printable(text)` to `path` atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON to `path` atomically; see `json_text`."""
    write_text(path, json_text(data, indent=2) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
