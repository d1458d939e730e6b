"""What the program writes and removes: one rule for every verb.

An output folder carries a marker, `.mmdit_lora.json`: the verb that wrote it and a manifest, each file with its size and a
digest.
Only what a manifest lists, unchanged since, is ever replaced or removed; what else lies there is the user's. A folder with
files and no marker is not written to, nor is one of another verb, nor an input, nor what is neither file nor folder.

A lock says who is writing. Whoever takes over the lock of a process that died finishes or undoes what that left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
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
    is_reserved,
    kind_of,
    make_folders,
    on_abandon,
    os_errors_as_input_errors,
    output_path,
    remove_all_temporaries,
    remove_empty,
    remove_temporaries,
    tag_of,
    write_text,
)
from mmdit_lora.locks import FolderLock

MARKER = ".mmdit_lora.json"
_LOCK = f"{RESERVED}lock"
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # of file managers, nobody's
_CURE = "give another folder, or move what is in it away"

Inputs = Mapping[str, str | Path | None]
Stamp = list[int | str] | None  # size and digest; None: a folder, or a file that is being written or added to
_DIGESTED = 4 * 2**20  # bytes at a file's beginning and end
log = logging.getLogger(__name__)


@dataclass
class Marker:
    """What a folder's `.mmdit_lora.json` says.

    Args:
        verb: what wrote the folder. files: relative name -> stamp; a folder's name ends in "/".
    """

    verb: str
    files: dict[str, Stamp] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Marker | None:
        """The marker of `folder`; None where there is none that can be read."""
        try:
            content: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            return cls(str(content["written_by"]), dict(content["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Put it into `folder`."""
        content = {"written_by": self.verb, "files": self.files}
        write_text(folder / MARKER, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")

    def has(self, folder: Path, name: str) -> bool:
        """Whether `folder/name` is what was written there; `name` of a folder ends in "/"."""
        if name not in self.files:
            return False
        stamp = self.files[name]
        return stamp is None or stamp == _stamp(folder / name)


@contextmanager
def new_folder(out: str | Path, *, verb: str, inputs: Inputs | None = None) -> Iterator[Path]:
    """Yield a temporary folder; on success it is the folder `out`, all at once. An earlier one of the same verb is replaced.

    Args:
        out: the folder to write. verb: what writes it.
        inputs: what is read, by option or key -> path; what is no path of this machine is passed over.

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
    """Before any work: whether `new_folder` may write `out`; returns it without links. Writes nothing.

    Raises:
        InputError: it is, holds or lies in an input; it is no folder; it holds something else than what `verb` wrote; it
            cannot be replaced as a whole, as a mount point and the folder that one is in cannot.
    """
    out = output_path(out, folder=True)
    refuse_inputs([out], inputs or {}, verb=verb)
    _refuse_irreplaceable(out, verb)
    names = _names(out)
    if not names:
        _refuse_held(out)
        return out
    marker = _own_marker(out, (verb,), names)
    foreign = [name for name in names if not marker.has(out, name)]
    if foreign:
        raise InputError(
            f"holds files that `{verb}` did not write, or that were changed since: {listed(foreign)}",
            where=_where(out, verb),
            cure=_CURE,
        )
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
    strict: bool = True,
    logs: Iterable[str] = (),
    again: str = "the same call",
) -> Iterator[Path]:
    """Yield the folder `out`, to write `names` in it one after the other, over several starts.

    Args:
        verb: what writes it.
        names: what may be written: files, and folders with "/" at the end, in which nothing is replaced that was not
            written by the same verb.
        inputs: what is read, by option or key -> path.
        others: verbs that may have begun the folder.
        adopt: a folder without marker is taken over (one of an earlier version, which the caller knows to be his).
        strict: refuse an `out` in a folder that is read.
        logs: those of `names` that are only added to: who changed them does not matter.
        again: what goes on where a start was stopped.

    Raises:
        InputError: see `check_open_folder`; or another process is writing it, or it cannot be written.
    """
    names, logs = list(names), set(logs)
    out = output_path(out, folder=True)
    rules: dict[str, Any] = {"verb": verb, "others": tuple(others), "adopt": adopt}
    check_open_folder(out, names=names, inputs=inputs, strict=strict, **rules)
    with _locked(out, out / _LOCK, out) as lock, os_errors_as_input_errors(out):
        _report(out, [*remove_all_temporaries(out), *_remove_old_temporaries(out, names)])
        _check_names(out, names, **rules)
        nested = lock.is_nested
        fresh = not nested and not _top(out)
        marker = (None if fresh else Marker.read(out)) or Marker(verb)
        marker.files |= dict.fromkeys(names)
        marker.write(out)

        def settle() -> str | None:
            if nested:
                return None  # the verb around this one goes on writing
            if fresh and not _top(out):
                (out / MARKER).unlink(missing_ok=True)
                return None
            now = Marker.read(out) or marker  # a verb within this one may have added names
            there = [name for name in now.files if (out / name).exists()]
            now.files = {name: None if name in logs else _stamp(out / name) for name in there}
            now.write(out)
            return f"{again} goes on with {out}"

        forget = on_abandon(settle)
        try:
            yield out
        finally:
            forget()
            with suppress(OSError, InputError):
                settle()


def check_open_folder(
    out: str | Path,
    *,
    verb: str,
    names: Iterable[str],
    inputs: Inputs | None = None,
    others: tuple[str, ...] = (),
    adopt: bool = False,
    strict: bool = True,
) -> Path:
    """Before any work: whether `open_folder` may write `out`; returns it without links. Writes nothing.

    Raises:
        InputError: what would be written is, holds or lies in an input; `out` is no folder, or has files and no marker,
            or the marker of another verb; a name is there that the program did not write, or that was changed since.
    """
    out, names = output_path(out, folder=True), list(names)
    refuse_inputs([out / name for name in names], inputs or {}, verb=verb, inside=strict)
    _check_names(out, names, verb, others, adopt)
    return out


def _check_names(out: Path, names: list[str], verb: str, others: tuple[str, ...], adopt: bool) -> None:
    found = [name for name in _top(out) if not _is_old_temporary(out / name, names)]
    if not found or (adopt and Marker.read(out) is None):
        return
    marker = _own_marker(out, (verb, *others), found)
    changed = [name for name in names if os.path.lexists(out / name) and not marker.has(out, name)]
    if changed:
        raise InputError(
            f"holds files that `{marker.verb}` did not write, or that were changed since: {listed(changed)}",
            where=_where(out, verb),
            cure="move them away, or give another folder",
        )


def check_new_file(
    out: str | Path, *, verb: str, inputs: Inputs | None = None, is_own: Callable[[Path], bool] | None = None
) -> Path:
    """Before any work: whether `verb` may write the file `out`; returns it without links. Removes what killed processes
    left of it.

    Args:
        is_own: whether a file is one that `verb` wrote; None = no existing file is replaced.

    Raises:
        InputError: it is or lies in an input; it exists, and `is_own` does not know it; it is no file.
    """
    out = output_path(out, folder=False)
    refuse_inputs([out], inputs or {}, verb=verb)
    if out.exists() and (is_own is None or not is_own(out)):
        why = "" if is_own is None else f" and is not what `{verb}` wrote, or was changed since"
        raise InputError(
            f"exists already{why}", where=_where(out, verb), cure="give another --out, or remove it yourself"
        )
    _report(out, remove_temporaries(out))
    return out


def refuse_inputs(targets: Iterable[Path], inputs: Inputs, *, verb: str, inside: bool = True) -> None:
    """Raises `InputError`: a target is an input, holds one, or (with `inside`) lies in one. Links and hard links count.

    Args:
        targets: what will be written or replaced. inputs: option or key -> path, pattern, or what is no path.
    """
    read = {label: place for label, given in inputs.items() if (place := _existing(given)) is not None}
    if not read:
        return
    for target in targets:
        chain = _chain(target)
        for label, place in read.items():
            own, above = _identity(place), _chain(place)
            if _identity(target) == own:
                what = "is"
            elif _identity(target) is not None and _identity(target) in above:
                what = "holds"
            elif inside and place.is_dir() and own in chain:
                what = "lies in"
            else:
                continue
            raise InputError(
                f"{what} what is read: {label} {inputs[label]}",
                where=_where(target, verb),
                cure="give another place to write",
            )


def refuse_unmarked(folder: Path, *, own: str) -> None:
    """Raises `InputError`: `folder` has files, and no folder `own`, which stands for the marker where many processes write at
    once, and only files whose names say what they are."""
    found = _top(output_path(folder, folder=True))
    if found and (marker := Marker.read(folder)) is not None:
        raise InputError(f"holds what `{marker.verb}` wrote", where=str(folder), cure=_CURE)
    if found and not (folder / own).is_dir():
        raise InputError(f"is not empty, and holds no {own}: it holds {listed(found)}", where=str(folder), cure=_CURE)


@contextmanager
def _locked(place: Path, file: Path, what: Path) -> Iterator[FolderLock]:
    """Hold the lock `file` in `place`, which is made."""
    with os_errors_as_input_errors(what):
        made = make_folders(place)
        lock = FolderLock.at(file, what)

        def undo() -> None:
            if lock.held:
                lock.release()
            remove_empty(made)

        forget = on_abandon(undo)
        try:
            before = lock.acquire()
        except BaseException:
            forget()
            remove_empty(made)
            raise
        try:
            if before is not None:
                _report(what, [f"took the lock over from process {before.pid}, started {before.since}, which died"])
            yield lock
        finally:
            forget()
            undo()


def _refuse_irreplaceable(out: Path, verb: str) -> None:
    """Raises `InputError`: `out` cannot be renamed, or a renamed one would leave the user's shell in a removed folder."""
    here = Path.cwd()
    kind = "the current directory" if out == here else "above the current directory" if out in here.parents else ""
    if not kind and os.path.ismount(out):
        kind = "a mount point"
    if kind:
        raise InputError(
            f"is {kind}, and `{verb}` replaces its folder as a whole",
            where=_where(out, verb),
            cure="give a folder in it",
        )


def _refuse_held(out: Path) -> None:
    """Raises `InputError`: a process that writes file by file has just begun in `out`."""
    if (out / _LOCK).exists():
        lock = FolderLock.at(out / _LOCK, out)
        lock.acquire()
        lock.release()


def _beside(out: Path) -> Path:
    """The lock of a folder that is replaced as a whole, and so cannot lie in it."""
    return out.parent / f"{RESERVED}{tag_of(out.name)}.lock"


def _report(out: Path, lines: list[str]) -> None:
    if lines:
        log.warning("%s: %s", out, "; ".join(lines))


def _own_marker(out: Path, verbs: tuple[str, ...], found: list[str]) -> Marker:
    marker = Marker.read(out)
    if marker is None:
        raise InputError(
            f"is not empty, and carries no {MARKER} that says the program wrote it (it holds {listed(found)})",
            where=_where(out, verbs[0]),
            cure=_CURE,
        )
    if marker.verb not in verbs:
        raise InputError(f"holds what `{marker.verb}` wrote", where=_where(out, verbs[0]), cure=_CURE)
    return marker


def _where(out: Path, verb: str) -> str:
    """An output, as the user gave it to a verb."""
    return (
        f"output_dir {out}" if verb == "train" else str(out) if verb.startswith(("save", "write")) else f"--out {out}"
    )


def _top(folder: Path) -> list[str]:
    """Names in a folder, without the program's own hidden ones and what file managers leave."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(folder), cure="give another folder") from None
    return [name for name in names if name != MARKER and not is_reserved(name) and name not in _LITTER]


def _names(folder: Path) -> list[str]:
    """All that is below a folder, relative; the name of a folder ends in "/". Links are not followed."""
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
    """Size and digest of a file: of large ones, only of the beginning and the end. None of a folder."""
    try:
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            return None
        if not stat.S_ISREG(found.st_mode):
            return [-1, kind_of(found.st_mode)]
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_DIGESTED))
            if found.st_size > _DIGESTED:
                file.seek(max(_DIGESTED, found.st_size - _DIGESTED))
                digest.update(file.read())
        return [found.st_size, digest.hexdigest()[:32]]
    except OSError:
        return [-1, ""]


def _existing(given: str | Path | None) -> Path | None:
    """The place of an input on this machine: of a pattern, the folder that it begins with."""
    if given is None or not str(given):
        return None
    path = Path(given)
    try:
        while not path.exists():
            if not any(letter in path.name for letter in "*?[{"):
                return None
            path = path.parent
    except (OSError, ValueError):
        return None
    return Path(os.path.realpath(path))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _chain(path: Path) -> list[tuple[int, int]]:
    """Identities of the folders above a path, those that exist."""
    return [identity for above in path.parents if (identity := _identity(above)) is not None]


def _is_old_temporary(path: Path, names: Iterable[str]) -> bool:
    """Whether a file is an empty temporary of an earlier version: `.report.json.k3j2h1g0.json`, of one of `names`."""
    for name in names:
        start, end = f".{name}.", Path(name).suffix or "/"
        middle = path.name[len(start) : len(path.name) - len(end)]
        if path.name.startswith(start) and path.name.endswith(end) and len(middle) == 8 and middle.islower():
            return path.is_file() and not path.is_symlink() and path.stat().st_size == 0
    return False


def _remove_old_temporaries(out: Path, names: list[str]) -> list[str]:
    found = [out / name for name in _top(out) if _is_old_temporary(out / name, names)]
    for path in found:
        path.unlink(missing_ok=True)
    return [f"removed what an earlier version left half-written ({listed(p.name for p in found)})"] if found else []
