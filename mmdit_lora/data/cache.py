"""Encodings on disk, found by what they are made from: a changed input has another key, so nothing can be stale.

One entry a file, `ROOT/v1/KIND/ab/<sha256 of the inputs>.safetensors`: tensors, and a JSON note in the header behind a
checksum over the whole file. Files are written beside and renamed; whoever makes an entry holds a lock on its key, which
the kernel lets go when the process dies. So a fill that is killed leaves whole entries, and several processes share the
work. An entry of a file of its own costs about 10 microseconds to read; shards would save a part of that, and lose this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from mmdit_lora.files import RESERVED, atomic_file, os_errors_as_input_errors
from mmdit_lora.outputs import refuse_unmarked

FORMAT = "v1"  # of the files and of all keys; another one is another folder
LATENTS, PROMPTS, PHRASES, VIEWS, WEIGHTS = KINDS = ("latents", "prompts", "phrases", "views", "weights")

_HALF_WRITTEN = re.compile(rf"(?:{re.escape(RESERVED)}|\.)([0-9a-f]{{64}})[-.]")  # the second, of earlier versions
_HEADER_KEY = "mmdit_lora"
_NO_CHECK = b"0" * 32
_CHECK_MARK = f'"{_HEADER_KEY}":"'.encode()
_MAPPED_FROM = 256 * 1024  # bytes; below, a copy is faster than a mapping
_TOUCH_AFTER = 3600 * 10**9  # ns; a read moves an entry's time only where it is older than that
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}

log = logging.getLogger(__name__)


def content_key(*parts: Any) -> str:
    """SHA-256 of JSON values (bytes stand as their own SHA-256), in order; 64 hex digits."""
    plain = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps([FORMAT, *plain], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def pixel_digest(pixels: Tensor) -> str:
    """SHA-256 of what the VAE sees: (3, H, W) in [-1, 1], as `prepare` makes it, to its bytes and size."""
    whole = ((pixels + 1) * 127.5).round().to(torch.uint8).contiguous()
    return content_key("pixels", list(whole.shape), whole.numpy().tobytes())


@dataclass(frozen=True)
class Entry:
    """Tensors by name, and what is said of them. The tensors may lie in the file itself: do not write into them."""

    tensors: dict[str, Tensor]
    note: Any = None


@dataclass
class CacheStats:
    """What this process did: entries found, made, found damaged (by kind), bytes read and written."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "hits": dict(sorted(self.hits.items())),
            "misses": dict(sorted(self.misses.items())),
            "damaged": dict(sorted(self.damaged.items())),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


class DiskCache:
    """Entries under `root`, which is made with the first of them.

    An entry's checksum is verified when this process reads it first, and again where its file has changed since.

    Raises:
        InputError: `root` is no folder, or holds something else than a cache.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        refuse_unmarked(self.root, own=FORMAT)
        self.folder = self.root / FORMAT
        self.stats = CacheStats()
        self._verified: dict[tuple[str, str], tuple[int, int, int]] = {}

    def path(self, kind: str, key: str) -> Path:
        """The file of an entry, there or not."""
        return Path(self._name(kind, key))

    def __contains__(self, item: tuple[str, str]) -> bool:
        return self.path(*item).is_file()

    def read(self, kind: str, key: str, *, tell: bool = True) -> Entry | None:
        """An entry, or None: it is not there, or it is damaged, which is said and counted where `tell` is true."""
        path = self._name(kind, key)
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # `open` costs twice as much
            try:
                status = os.fstat(handle)
                if status.st_size >= _MAPPED_FROM:
                    raw: Any = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
                else:
                    raw = bytearray(os.read(handle, status.st_size))
            finally:
                os.close(handle)
        except FileNotFoundError:
            return None
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get((kind, key)) != state and not _is_whole(raw):
            if tell:
                self.stats.damaged[kind] += 1
                log.warning("%s is damaged: it is made anew", path)
            return None
        now = time.time_ns()
        if now - status.st_mtime_ns > _TOUCH_AFTER:  # what was used last is pruned last
            try:
                os.utime(path, ns=(now, now))
                state = (status.st_ino, status.st_size, now)
            except OSError:
                pass  # a cache that may only be read serves as well
        self._verified[kind, key] = state
        self.stats.bytes_read += len(raw)
        return _parse(raw)

    def write(self, kind: str, key: str, entry: Entry) -> None:
        """Put an entry in its place, over what is there."""
        whole = _serialise(entry)
        with atomic_file(self.path(kind, key), label=key) as temporary:
            temporary.write_bytes(whole)
        self._verified.pop((kind, key), None)
        self.stats.bytes_written += len(whole)

    def get(self, kind: str, key: str, make: Callable[[], Entry]) -> Entry:
        """The entry, made by `make` where it is missing or damaged; of several processes, one makes it and the others wait."""
        found = self.try_get(kind, key, make, wait=True)
        assert found is not None
        return found

    def try_get(self, kind: str, key: str, make: Callable[[], Entry], *, wait: bool = False) -> Entry | None:
        """As `get`; without `wait`, None where another process is making it."""
        found = self.read(kind, key)
        if found is None:
            lock = self._lock(key)
            try:
                lock.acquire(blocking=wait)
            except Timeout:
                return None
            try:
                found = self.read(kind, key, tell=False)  # another process may have made it meanwhile
                if found is None:
                    self.stats.misses[kind] += 1
                    entry = make()
                    self.write(kind, key, entry)
                    return entry
            finally:
                lock.release()
        self.stats.hits[kind] += 1
        return found

    def entries(self) -> Iterator[tuple[str, str, Path]]:
        """(kind, key, file) of all that is there."""
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("??/[!.]*.safetensors")):
                yield kind, path.stem, path

    def size(self) -> dict[str, dict[str, int]]:
        """kind -> {"entries", "bytes"} of all that is there."""
        out: dict[str, dict[str, int]] = {}
        for kind, _, path in self.entries():
            of_kind = out.setdefault(kind, {"entries": 0, "bytes": 0})
            of_kind["entries"] += 1
            of_kind["bytes"] += path.stat().st_size
        return out

    def verify(self) -> tuple[int, list[Path]]:
        """Read every entry of the folder and take the damaged ones out.

        Returns:
            How many were read, and the files that were taken out.
        """
        count, damaged = 0, []
        for kind, key, path in self.entries():
            count += 1
            self._verified.pop((kind, key), None)
            if self.read(kind, key, tell=False) is None and path.exists():
                path.unlink(missing_ok=True)
                damaged.append(path)
        return count, damaged

    def prune(self, max_bytes: int) -> tuple[int, int]:
        """Take entries out, those that were not used for longest first, until at most `max_bytes` are left.

        Returns:
            How many were taken out, and their bytes.
        """
        files = []
        for _, _, path in self.entries():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, str(path), status.st_size))
        total, count, freed = sum(size for *_, size in files), 0, 0
        for _, name, size in sorted(files):
            if total - freed <= max_bytes:
                break
            Path(name).unlink(missing_ok=True)
            count, freed = count + 1, freed + size
        return count, freed

    def sweep(self) -> int:
        """Remove what killed processes left half-written; how many files. What a live process writes has its lock held."""
        count = 0
        for path in self.folder.glob("*/??/.*.safetensors"):
            key = _HALF_WRITTEN.match(path.name)
            if key is None:
                continue
            lock = self._lock(key[1])
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                path.unlink(missing_ok=True)
                count += 1
            finally:
                lock.release()
        return count

    def _name(self, kind: str, key: str) -> str:
        return f"{self.folder}/{kind}/{key[:2]}/{key}.safetensors"

    def _lock(self, key: str) -> FileLock:
        locks = self.folder / "locks"
        with os_errors_as_input_errors(locks):
            locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / key[:3], poll_interval=0.01)


def _serialise(entry: Entry) -> bytes:
    """Safetensors with one header key (several come in any order): 32 digits of XXH3-128 over the rest, then the note."""
    note = json.dumps(entry.note, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    whole = bytearray(save(tensors, metadata={_HEADER_KEY: _NO_CHECK.decode() + note}))
    start = whole.index(_CHECK_MARK) + len(_CHECK_MARK)
    whole[start : start + len(_NO_CHECK)] = xxhash.xxh3_128_hexdigest(whole).encode()
    return bytes(whole)


def _is_whole(raw: Any) -> bool:
    start = raw.find(_CHECK_MARK, 0, 4096) + len(_CHECK_MARK)
    if start < len(_CHECK_MARK):
        return False
    view = memoryview(raw)
    digest = xxhash.xxh3_128(view[:start])
    digest.update(_NO_CHECK)
    digest.update(view[start + len(_NO_CHECK) :])
    return bool(digest.hexdigest().encode() == bytes(view[start : start + len(_NO_CHECK)]))


def _parse(raw: Any) -> Entry:
    """Tensors in place: safetensors' own readers copy them."""
    data = 8 + int.from_bytes(raw[:8], "little")
    start = raw.find(_CHECK_MARK, 0, data) + len(_CHECK_MARK)
    note, places = _header(bytes(raw[8:start] + raw[start + len(_NO_CHECK) : data]))
    tensors = {}
    for name, dtype, shape, offset, count in places:
        flat = torch.frombuffer(raw, dtype=dtype, offset=data + offset, count=count) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).view(shape)
    return Entry(tensors, json.loads(note))


@lru_cache(maxsize=64)
def _header(header: bytes) -> tuple[str, list[tuple[str, torch.dtype, list[int], int, int]]]:
    """The note, and (name, dtype, shape, offset, count) of each tensor; the header has come without its checksum.

    Kept: where shapes and notes are the same, so is it, and reading it takes longer than the file.
    """
    content = json.loads(header.decode())
    note = content.pop("__metadata__")[_HEADER_KEY]
    places = []
    for name, place in content.items():
        dtype, (start, end) = _DTYPES[place["dtype"]], place["data_offsets"]
        places.append((name, dtype, place["shape"], start, (end - start) // dtype.itemsize))
    return note, places
