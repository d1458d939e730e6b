"""Which files and folders a verb may write, replace and remove: one rule for all verbs.

An output folder holds a marker, `.mmdit_lora.json`: the verb that wrote it and a manifest of its files with size and digest.
Only files that the manifest lists and that have not changed since are replaced or removed; all others are the user's. A verb does
not write to a folder with files and no marker, to a folder of another verb, to an input, or to what is neither file nor folder.

A lock names the process that writes. A process that takes over the lock of a dead one finishes or undoes its work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit_lora.errors import InputError, listed
from mmdit_lora.files import (
    RESERVED,
    atomic_folder,
    before_replacing,
    exists,
    is_reserved,
    kind_of,
    make_folders,
    os_errors_as_input_errors,
    output_path,
    read_text,
    remove_all_temporaries,
    remove_empty,
    remove_temporaries,
    tag_of,
    undone_at_end,
    write_text,
)
from mmdit_lora.json_files import parse_object
from mmdit_lora.locks import FolderLock

MARKER = ".mmdit_lora.json"
_LOCK = f"{RESERVED}lock"
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # of file managers, nobody's
_HINT = "give another folder, or move what is in it away"

Inputs = Mapping[str, str | Path | None]
Stamp = list[int | str] | None  # see `_stamp`; None: a folder, or a file that is only added to
_LARGE = 64 * 2**20  # bytes; see `_stamp`
_LARGEST_MARKER = 2**30  # bytes; a line of a manifest has about 100
log = logging.getLogger(__name__)


@dataclass
class Marker:
    """What a folder's `.mmdit_lora.json` says.

    Args:
        verb: the verb that wrote the folder. files: relative name -> stamp; a folder's name ends in "/".
        was: stamps of the files that those in `files` were about to replace: a kill may have come before the rename.
    """

    verb: str
    files: dict[str, Stamp] = field(default_factory=dict)
    was: dict[str, Stamp] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Marker | None:
        """The marker of `folder`; None if there is none or it is damaged.

        Raises:
            InputError: something of that name is not a regular file, or is huge.
        """
        place = folder / MARKER
        if not os.path.lexists(place):
            return None
        if place.is_symlink():  # it would be written through
            raise InputError("is a link, and no marker of an output folder", location=str(place), hint=_HINT)
        text = read_text(place, what="marker of an output folder", limit=_LARGEST_MARKER, hint=_HINT)
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            content = parse_object(text, location=str(place))
            marker = cls(str(content["written_by"]), dict(content["files"]), dict(content.get("was", {})))
            stamps = [*marker.files.values(), *marker.was.values()]
            return marker if all(s is None or (isinstance(s, list) and len(s) >= 2) for s in stamps) else None
        return None

    def write(self, folder: Path) -> None:
        """Put it into `folder`."""
        content = {"written_by": self.verb, "files": self.files} | ({"was": self.was} if self.was else {})
        write_text(folder / MARKER, json.dumps(content, separators=(",", ":")) + "\n")

    def has(self, folder: Path, name: str) -> bool:
        """Whether `folder/name` is what was written there; `name` of a folder ends in "/"."""
        return any(name in kept and _is_unchanged(folder / name, kept[name]) for kept in (self.files, self.was))

    def settle(self, folder: Path) -> None:
        """Nothing is being written: each name in `was` is what lies there."""
        self.files |= {name: _stamp(folder / name) for name in self.was if self.has(folder, name)}
        self.was.clear()


@contextmanager
def new_folder(out: str | Path, *, verb: str, inputs: Inputs | None = None) -> Iterator[Path]:
    """Yield a temporary folder; on success it is the folder `out`, all at once. An earlier one of the same verb is replaced.

    Args:
        out: the folder to write. verb: the verb that writes it.
        inputs: option or key -> path that is read; URLs and the like are skipped.

    Raises:
        InputError: see `check_new_folder`; or another process is writing it, or it cannot be written.
    """
    out = check_new_folder(out, verb=verb, inputs=inputs)
    with _locked(out.parent, _beside(out), out):
        _report(out, remove_temporaries(out))

        def finish(temporary: Path) -> None:
            check_new_folder(out, verb=verb)  # somebody may have put something there meanwhile
            Marker(verb, {name: _stamp(temporary / name) for name in _names(temporary)}).write(temporary)

        with atomic_folder(out, before_swap=finish) as temporary:
            yield temporary


def check_new_folder(out: str | Path, *, verb: str, inputs: Inputs | None = None) -> Path:
    """Before any work: check that `new_folder` may write `out`, and return it without links. Writes nothing.

    Raises:
        InputError: it is an input, holds one or lies in one; it is not a folder; it holds what `verb` did not write; it cannot
            be replaced as a whole, such as a mount point or the current folder.
    """
    out = output_path(out, folder=True)
    refuse_inputs([out], inputs or {}, verb=verb)
    _refuse_irreplaceable(out, verb)
    names = _names(out)
    if not names:
        Marker.read(out)  # what the name of a marker hides is not removed
        _refuse_held(out)
        return out
    _require_own(out, (verb,), found=names, names=names)
    return out


@contextmanager
def open_folder(
    out: str | Path,
    *,
    verb: str,
    names: Iterable[str],
    inputs: Inputs | None = None,
    others: Iterable[str] = (),
    adopt: bool = False,
    logs: Iterable[str] = (),
    again: str = "the same call",
) -> Iterator[Path]:
    """Yield the folder `out`, to write `names` in it one after the other, over several starts.

    Its files are written by `files.atomic_file`: the marker gets the digest of each before the file gets its name. So after a
    kill it is known what was written, and that a user's file with one of `names` was not.

    Args:
        verb: what writes it.
        names: what may be written: files, and folders with "/" at the end, in which nothing is replaced that was not
            written by the same verb.
        inputs: what is read, by option or key -> path.
        others: verbs that may have begun the folder.
        adopt: take over a folder without marker, which the caller knows to be of an earlier version.
        logs: those of `names` that are only added to, and may have been changed by others.
        again: what resumes a stopped start, for the message.

    Raises:
        InputError: see `check_open_folder`; or another process is writing it, or it cannot be written. Within it,
            `atomic_file` raises one if somebody else has put something in the file's place.
    """
    names, logs = list(names), set(logs)
    out = output_path(out, folder=True)
    rules: dict[str, Any] = {"verb": verb, "others": tuple(others), "adopt": adopt}
    check_open_folder(out, names=names, inputs=inputs, **rules)
    with _locked(out, out / _LOCK, out) as lock, os_errors_as_input_errors(out):
        old = [out / name for name in _top(out) if _is_old_temporary(out / name, names)]
        for path in old:
            path.unlink(missing_ok=True)
        removed = f"removed what an earlier version left half-written ({listed(path.name for path in old)})"
        _report(out, [*remove_all_temporaries(out), *([removed] if old else [])])
        check_open_folder(out, names=names, **rules)
        nested = lock.is_nested
        fresh = not nested and not _top(out)
        marker = (None if fresh else Marker.read(out)) or Marker(verb)
        if not nested:
            marker.settle(out)
        for name in names:
            if name.endswith("/") or name in logs:
                marker.files[name] = None
            elif marker.files.get(name) is None and os.path.lexists(out / name):  # an earlier version had no stamps
                marker.files[name] = _stamp(out / name)
        marker.write(out)

        def note(temporary: Path, path: Path) -> None:
            now = Marker.read(out) or marker  # a verb within this one may have added names
            if path.name == MARKER or now.files.get(path.name, ()) is None:
                return
            if os.path.lexists(path):
                if not now.has(out, path.name):
                    raise _foreign(out, verb, now, [path.name])
                now.was[path.name] = _stamp(path)
            now.files[path.name] = _stamp(temporary)
            now.write(out)

        def settle() -> str | None:
            if nested:
                return None  # the verb around this one goes on writing
            before_replacing.pop(out, None)
            if fresh and not _top(out):
                (out / MARKER).unlink(missing_ok=True)
                return None
            now = Marker.read(out) or marker
            now.settle(out)
            now.files = {name: stamp for name, stamp in now.files.items() if os.path.lexists(out / name)}
            now.write(out)
            return f"{again} goes on with {out}"

        before_replacing.setdefault(out, note)
        with undone_at_end(settle):
            yield out


def check_open_folder(
    out: str | Path,
    *,
    verb: str,
    names: Iterable[str],
    inputs: Inputs | None = None,
    others: tuple[str, ...] = (),
    adopt: bool = False,
) -> Path:
    """Before any work: check that `open_folder` may write `out`, and return it without links. Writes nothing.

    Raises:
        InputError: what would be written is, holds or lies in an input; `out` is no folder, or has files and no marker,
            or the marker of another verb; a name is there that the program did not write, or that was changed since.
    """
    out, names = output_path(out, folder=True), list(names)
    refuse_inputs([out / name for name in names], inputs or {}, verb=verb)
    found = [name for name in _top(out) if not _is_old_temporary(out / name, names)]
    marker = Marker.read(out)
    if found and (marker is not None or not adopt):
        present = [name for name in names if os.path.lexists(out / name)]
        _require_own(out, (verb, *others), found=found, names=present)
    return out


def check_new_file(
    out: str | Path, *, verb: str, inputs: Inputs | None = None, is_own: Callable[[Path], bool] | None = None
) -> Path:
    """Before any work: check that `verb` may write the file `out`, and return it without links. Removes what killed processes
    left of it.

    Args:
        is_own: whether a file is one that `verb` wrote; None = no existing file is replaced.

    Raises:
        InputError: it is an input or lies in one; it exists and is not the verb's own; it is not a file.
    """
    out = output_path(out, folder=False)
    refuse_inputs([out], inputs or {}, verb=verb)
    if out.exists() and (is_own is None or not is_own(out)):
        why = "" if is_own is None else f" and is not what `{verb}` wrote, or was changed since"
        raise _refusal(out, verb, f"exists already{why}", "give another --out, or remove it yourself")
    _report(out, remove_temporaries(out))
    return out


def refuse_inputs(targets: Iterable[Path], inputs: Inputs, *, verb: str, inside: bool = True) -> None:
    """Raises `InputError`: a target is an input, holds one, or (with `inside`) lies in one. Links and hard links count.

    Args:
        targets: what will be written or replaced. inputs: option or key -> path, pattern, or what is no path.
    """
    read = {label: place for label, given in inputs.items() if (place := _existing(given)) is not None}
    for target in targets if read else ():
        for label, place in read.items():
            if _is_same(target, place):
                what = "is"
            elif any(_is_same(target, above) for above in place.parents):
                what = "holds"
            elif inside and place.is_dir() and any(_is_same(place, above) for above in target.parents):
                what = "lies in"
            else:
                continue
            what += f" what is read: {label} {inputs[label]}"
            raise _refusal(target, verb, what, "give another place to write")


def refuse_unmarked(folder: Path, *, own: str) -> None:
    """Raises `InputError`: `folder` has files, and no folder `own`, which stands for the marker where many processes write at
    once, and only files whose names say what they are."""
    found = _top(output_path(folder, folder=True))
    marker = Marker.read(folder) if found else None
    if marker is not None or (found and not (folder / own).is_dir()):
        what = f"is not empty, and holds no {own}: it holds {listed(found)}"
        what = what if marker is None else f"holds what `{marker.verb}` wrote"
        raise InputError(what, location=str(folder), hint=_HINT)


@contextmanager
def _locked(place: Path, file: Path, what: Path) -> Iterator[FolderLock]:
    """Hold the lock `file` in `place`, which is made."""
    with os_errors_as_input_errors(what):
        made = make_folders(place)
        lock, acquired = FolderLock.at(file, what), False

        def undo() -> None:
            if acquired:
                lock.release()
            remove_empty(made)

        with undone_at_end(undo):
            before = lock.acquire()
            acquired = True
            if before is not None:
                _report(what, [f"took the lock over from process {before.pid}, started {before.since}, which died"])
            yield lock


def _refuse_irreplaceable(out: Path, verb: str) -> None:
    """Raises `InputError`: `out` cannot be renamed, or a renamed one would leave the user's shell in a removed folder."""
    here = Path.cwd()
    kind = "the current directory" if out == here else "above the current directory" if out in here.parents else ""
    if not kind and os.path.ismount(out):
        kind = "a mount point"
    if kind:
        raise _refusal(out, verb, f"is {kind}, and `{verb}` replaces its folder as a whole", "give a folder in it")


def _refuse_held(out: Path) -> None:
    """Raises `InputError`: a process that writes file by file has just begun in `out`."""
    if os.path.lexists(out / _LOCK):
        lock = FolderLock.at(out / _LOCK, out)
        lock.acquire()
        lock.release()


def _beside(out: Path) -> Path:
    """The lock of a folder that is replaced as a whole, and so cannot lie in it."""
    return out.parent / f"{RESERVED}{tag_of(out.name)}.lock"


def _report(out: Path, lines: list[str]) -> None:
    if lines:
        log.warning("%s: %s", out, "; ".join(lines))


def _foreign(out: Path, verb: str, marker: Marker, names: list[str]) -> InputError:
    what = f"holds files that `{marker.verb}` did not write, or that were changed since: {listed(names)}"
    return _refusal(out, verb, what, "move them away, or give another folder")


def _require_own(out: Path, verbs: tuple[str, ...], *, found: list[str], names: list[str]) -> None:
    """Raises `InputError`: `out` has no marker of one of the verbs, or one of `names` is not what was written.

    Args:
        found: all that `out` holds, for the message.
    """
    marker = Marker.read(out)
    if marker is not None and marker.verb in verbs:
        if foreign := [name for name in names if not marker.has(out, name)]:
            raise _foreign(out, verbs[0], marker, foreign)
        return
    what = f"is not empty, and carries no {MARKER} that says the program wrote it (it holds {listed(found)})"
    if marker is not None:
        what = f"holds what `{marker.verb}` wrote"
    raise _refusal(out, verbs[0], what)


def _refusal(out: Path, verb: str, what: str, hint: str = _HINT) -> InputError:
    """The error of an output, named as the user gave it to the verb."""
    option = "" if verb.startswith(("save", "write")) else "output_dir " if verb == "train" else "--out "
    return InputError(what, location=f"{option}{out}", hint=hint)


def _top(folder: Path) -> list[str]:
    """Names in a folder, without the program's own hidden files and those of file managers."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise InputError(what, location=str(folder), hint="give another folder") from None
    return [name for name in names if name != MARKER and not is_reserved(name) and name not in _LITTER]


def _names(folder: Path) -> list[str]:
    """Relative names of all that is below a folder; that of a folder ends in "/". Links are not followed."""
    out: list[str] = []
    for name in _top(folder):
        place = folder / name
        if place.is_dir() and not place.is_symlink():
            out += [f"{name}/", *(f"{name}/{inner}" for inner in _names(place))]
            if (place / MARKER).exists():
                out.append(f"{name}/{MARKER}")
        else:
            out.append(name)
    return out


def _stamp(path: Path) -> Stamp:
    """Size and digest of a file, and times and inode of a large one, which show without reading it that it is unchanged; None
    for a folder.

    Reading a large file takes longer than a tick of the file system's clock: a change after its digest was made changes its
    times too. `cp -p` and rsync may keep the time of the content, but neither the inode's number nor its own time. The digest
    of smaller files is always compared.
    """
    try:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            return None
        if not stat.S_ISREG(found.st_mode):
            return [-1, kind_of(found.st_mode)]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        return [found.st_size, digest, *(_times(found) if found.st_size >= _LARGE else ())]
    except OSError:
        return [-1, ""]


def _times(found: os.stat_result) -> list[int]:
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_unchanged(path: Path, stamp: Stamp) -> bool:
    if stamp is None:
        return True
    try:
        found = path.lstat()
    except OSError:
        return False
    same_size = found.st_size == stamp[0]
    if stat.S_ISREG(found.st_mode) and (not same_size or stamp[2:] == _times(found)):
        return same_size
    return (_stamp(path) or [])[:2] == stamp[:2]


def _existing(given: str | Path | None) -> Path | None:
    """The path of an input on this machine; of a pattern, the folder that it begins with."""
    if given is None or not str(given):
        return None
    text = str(given)
    if re.match(r"[a-z][a-z0-9+.-]*:/", text):  # `Path` has made one slash of two
        # Of a chain (`zip://a::file:///p`) the last link says where it lies.
        text = os.path.expanduser(re.sub(r"^(file|local):(//)?", "", text.rpartition("::")[2]))  # noqa: PTH111
    path = Path(text)
    while not exists(path):
        if not set(path.name) & set("*?[{"):
            return None
        path = path.parent
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    with suppress(OSError, ValueError):
        return one.samefile(other)
    return False


def _is_old_temporary(path: Path, names: Iterable[str]) -> bool:
    """Whether a file is an empty temporary of an earlier version: `.report.json.k3j2h1g0.json`, of one of `names`."""
    forms = (rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(Path(name).suffix or '/')}" for name in names)
    is_temporary = any(re.fullmatch(form, path.name) for form in forms)
    return is_temporary and path.is_file() and not path.is_symlink() and path.stat().st_size == 0
