"""Where shards lie: local files, or anything that fsspec opens (`s3://`, `gs://`, `https://`, `memory://`, `hf://` ...)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mmdit_lora.errors import InputError
from mmdit_lora.files import require_file

Result = TypeVar("Result")
MOST_SHARDS = 100_000  # that one pattern may name
_TRIES, _FIRST_WAIT = 4, 0.25  # seconds; doubles each time
_BLOCK = 8 * 2**20  # bytes that are read at once where a whole shard is
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, InputError)
_DRIVERS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}


def is_url(path: str) -> bool:
    """Whether a path is one of fsspec: it begins with a protocol."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def expand(path: str, suffix: str) -> list[str]:
    """Names of the shards in order: of a folder, a glob, a brace pattern (`{000..009}`, `{a,b}`), one file; local or a URL.

    Raises:
        InputError: there is none, a pattern names more than `MOST_SHARDS`, a range is written backwards, or the store cannot be listed.
    """
    names = [name for one in _braces(path) for name in _listed(one, suffix)]
    if not names:
        raise InputError(
            f"there is no {suffix} file",
            location=path,
            hint="name a folder, a glob or a pattern such as set-{000..009}.tar",
        )
    doubled = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if doubled is not None:
        raise InputError(f"the pattern names {doubled} twice", location=path)
    return names


@dataclass(frozen=True)
class Stored:
    """One file of a store, as it was when it was opened.

    Args:
        name: path or URL. size: bytes. stamp: what changes with its content, as far as the store says it.
    """

    name: str
    size: int
    stamp: str
    fs: Any = field(default=None, repr=False, compare=False)
    inner: str = ""  # its path within `fs`

    @property
    def is_remote(self) -> bool:
        return self.fs is not None

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`; of a remote store tried again where it fails for once.

        Raises:
            InputError: it cannot be read, or holds less.
        """
        data = self.again(lambda: self._read(start, length))
        if len(data) != length:
            whole = self.is_remote and len(data) == self.size
            what = (
                "the store answers with the whole file, not with the part that was asked for" if whole else "is cut off"
            )
            hint = "use a store that knows ranged reads" if whole else "restore the file"
            raise InputError(what, location=self.name, hint=hint)
        return data

    def neighbour(self, suffix: str) -> bytes:
        """The whole remote file of this name and `suffix`. Raises `InputError` where there is none."""
        return self.again(lambda: bytes(self.fs.cat_file(self.inner + suffix)))

    @contextmanager
    def open(self, *, block: int = _BLOCK) -> Iterator[BinaryIO]:
        """The whole file. Args: block: bytes that are read ahead of a remote one."""
        if self.is_remote:
            file = self.again(lambda: self.fs.open(self.inner, "rb", block_size=block))
        else:
            file = Path(self.name).open("rb")  # noqa: SIM115 - closed below
        with file:
            yield file

    def _read(self, start: int, length: int) -> bytes:
        if self.is_remote:
            return bytes(self.fs.cat_file(self.inner, start=start, end=start + length))
        with open(self.name, "rb", buffering=0) as file:  # noqa: PTH123 - Path.open costs as much as the read
            file.seek(start)
            return file.read(length)

    def again(self, call: Callable[[], Result]) -> Result:
        """`retried`, if the store is remote; else called once, with the same errors."""
        return retried(call, self.name, tries=_TRIES if self.is_remote else 1)


def retried(call: Callable[[], Result], name: str, *, tries: int = _TRIES) -> Result:
    """`call()`, tried again after a wait where a store fails as networks do. Raises `InputError` with `name` in the end."""
    for attempt in range(1, tries + 1):
        try:
            return call()
        except InputError:
            raise
        except Exception as error:  # drivers raise what their libraries do
            error = _real(error)
            if attempt == tries or isinstance(error, _FINAL):
                what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})"
                raise InputError(what, location=name) from None
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _real(error: Exception) -> Exception:
    """fsspec says of whatever happens over HTTP that there is no such file; what it was is the cause.

    Other stores' causes (a KeyError, botocore's 404) mean what is said, and are not tried again.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    over_http = type(cause).__module__.startswith("aiohttp") or isinstance(cause, ConnectionError | TimeoutError)
    return cause if over_http and getattr(cause, "status", 0) != 404 else error


def find(name: str) -> Stored:
    """Raises `InputError`: no such file, or a driver is not installed."""
    if not is_url(name):
        status = require_file(name, what="shard").stat()
        return Stored(name, status.st_size, str(status.st_mtime_ns))
    fs, inner = _file_system(name)
    info = retried(lambda: fs.info(inner), name)
    if info.get("size") is None:
        raise InputError("the store does not say how large it is", location=name)
    known = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    stamp = next((str(info[key]) for key in known if info.get(key)), "")
    return Stored(name, int(info["size"]), stamp, fs, inner)


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except InputError:
        raise
    except Exception as error:  # whatever the drivers and their libraries raise: many connect, or open a file, at once
        driver = _DRIVERS.get(protocol)
        hint = "see that the address is right and can be reached"
        if isinstance(error, ImportError | ValueError):
            hint = f"install its driver: `pip install {driver}`" if driver else "see fsspec's list of protocols"
        raise InputError(f"{protocol}:// cannot be opened ({_reason(error)})", location=url, hint=hint) from None


def _listed(path: str, suffix: str) -> list[str]:
    has_glob = any(sign in path for sign in "*?[")
    if not is_url(path):
        if Path(path).is_dir():
            return sorted(str(found) for found in Path(path).glob(f"*{suffix}"))
        return sorted(glob(path)) if has_glob else [path]  # noqa: PTH207 - the pattern may be absolute
    if path.endswith(suffix) and not has_glob:
        return [path]
    fs, inner = _file_system(path)
    pattern = inner if has_glob else f"{inner.rstrip('/')}/*{suffix}"
    return sorted(fs.unstrip_protocol(found) for found in retried(lambda: fs.glob(pattern), path))


def _braces(path: str) -> list[str]:
    parts = re.split(r"\{([^{}]*)\}", path)
    choices = [[part] if place % 2 == 0 else _choices(part, path) for place, part in enumerate(parts)]
    named = math.prod(map(len, choices))
    if named > MOST_SHARDS:
        raise InputError(
            f"the pattern names {named:,} files, and at most {MOST_SHARDS:,} shards are read",
            location=path,
            hint="name those that are there, or write fewer and larger ones",
        )
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str, path: str) -> Sequence[str]:
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if numbers is None:
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        raise InputError(f"the range {{{inside}}} goes backwards", location=path)
    if last - first >= MOST_SHARDS:
        return range(first, last + 1)  # type: ignore[return-value]  # to be counted alone
    return [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]


def _reason(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text or type(error).__name__
