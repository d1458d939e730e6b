"""Encodings by what they are made from: a changed input has another key, so nothing can be stale. Memory lies before disk.

On disk one entry is a file, `ROOT/v1/KIND/ab/<sha256 of the inputs>.safetensors`: tensors, and a JSON note in the header
behind a checksum over the whole file. Files are written beside and renamed; whoever makes an entry holds a lock on its key,
which the kernel releases when the process dies. So a fill that is killed leaves whole entries, and several processes share
the work. Shards would be read a little faster, and lose this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from safetensors.torch import load, save
from torch import Tensor

from mmdit_lora.files import RESERVED, atomic_file, os_errors_as_input_errors
from mmdit_lora.outputs import refuse_unmarked

FORMAT = "v1"  # of the files and of all keys; another one is another folder
LATENTS, PROMPTS, PHRASES, VIEWS, WEIGHTS = KINDS = ("latents", "prompts", "phrases", "views", "weights")

CACHE_BYTES = 4 * 2**30  # of each kind, in memory
_HALF_WRITTEN = re.compile(rf"(?:{re.escape(RESERVED)}|\.)([0-9a-f]{{64}})[-.]")  # the second, of earlier versions
_HEADER_KEY = "mmdit_lora"
_NO_CHECK = b"0" * 32
_CHECK_MARK = f'"{_HEADER_KEY}":"'.encode()
_LOCK_DIGITS = 3  # of a key: so many locks share the keys
_TOUCH_AFTER = 3600 * 10**9  # ns; a read moves an entry's time only where it is older than that

log = logging.getLogger(__name__)


def content_key(*parts: Any) -> str:
    """SHA-256 of JSON values (bytes stand as their own SHA-256), in order; 64 hex digits."""
    plain = [hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(json.dumps([FORMAT, *plain], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def pixel_digest(image: Tensor) -> str:
    """SHA-256 of an image as it is encoded, (3, H, W) uint8, and of its size."""
    return content_key("pixels", list(image.shape), image.contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Entry:
    """Tensors by name, and what is noted of them. The tensors are kept: do not write into them."""

    tensors: dict[str, Tensor]
    note: Any = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class CacheStats:
    """What this process did on disk: entries found, made, found damaged (by kind), bytes read and written."""

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


class EncodingCache:
    """Entries in memory, and under `root`, which is made with the first of them.

    An entry's checksum is verified when this process reads it first, and again where its file has changed since. In memory,
    those that were not used for longest go first.

    Args:
        root: None = in memory only.
        max_bytes: of tensors of each kind in memory; entries without tensors are kept on disk alone.

    Raises:
        InputError: `root` is no folder, or holds something else than a cache.
    """

    def __init__(self, root: str | Path | None = None, *, max_bytes: int = CACHE_BYTES) -> None:
        self.root = None if root is None else Path(root)
        if self.root is not None:
            refuse_unmarked(self.root, own=FORMAT)
        self.folder = (self.root or Path()) / FORMAT
        self.stats, self.max_bytes = CacheStats(), max_bytes
        self._verified: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._memory: defaultdict[str, OrderedDict[str, Entry]] = defaultdict(OrderedDict)
        self._bytes: Counter[str] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process has its own memory."""
        return type(self), (self.root,)

    def path(self, kind: str, key: str) -> Path:
        """The file of an entry, there or not."""
        return Path(self._name(kind, key))

    def __contains__(self, item: tuple[str, str]) -> bool:
        kind, key = item
        return key in self._memory[kind] or (self.root is not None and os.path.isfile(self._name(kind, key)))  # noqa: PTH113 - for each sample

    def read(self, kind: str, key: str, *, warn: bool = True) -> Entry | None:
        """An entry on disk, or None: it is not there, or it is damaged, which is logged and counted where `warn` is true."""
        path = self._name(kind, key)
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - Path.open costs as much as the read
                status, raw = os.fstat(file.fileno()), file.read()
        except FileNotFoundError:
            return None
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get((kind, key)) != state and not _is_whole(raw):
            if warn:
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
        """Put an entry in its place on disk, over what is there."""
        whole = _serialise(entry)
        with atomic_file(self.path(kind, key), label=key) as temporary:
            temporary.write_bytes(whole)
        self._verified.pop((kind, key), None)
        self.stats.bytes_written += len(whole)

    def get(self, kind: str, key: str, make: Callable[[], Entry]) -> Entry:
        """The entry, made by `make` where it is missing or damaged; of several processes, one makes it and the others wait."""
        (entry,) = self.get_many(kind, [key], lambda _: [make()])
        assert entry is not None
        return entry

    def get_many(
        self,
        kind: str,
        keys: Sequence[str],
        make: Callable[[list[int]], Sequence[Entry]],
        *,
        batch: int = 1,
        wait: bool = True,
    ) -> list[Entry | None]:
        """The entries of `keys`, what is missing made.

        Args:
            make: from positions in `keys`, at most `batch` of them, to their entries. Not called twice for one key.
            wait: for another process that is making one; without, None stands for it.
        """
        position: dict[str, int] = {}
        for number, key in enumerate(keys):
            position.setdefault(key, number)
        entries = {key: self._recall(kind, key) for key in position}
        missing = [key for key in position if entries[key] is None]
        for start in range(0, len(missing), batch):
            with self._locked(missing[start : start + batch], wait=wait) as mine:
                if self.root is not None:  # another process may have made it meanwhile
                    entries |= {key: self._recall(kind, key, warn=False) for key in mine}
                absent = [key for key in mine if entries[key] is None]
                for key, entry in zip(absent, make([position[key] for key in absent]) if absent else (), strict=True):
                    self.stats.misses[kind] += 1
                    if self.root is not None:
                        self.write(kind, key, entry)
                    entries[key] = self._remember(kind, key, entry)
        return [entries[key] for key in keys]

    def _recall(self, kind: str, key: str, *, warn: bool = True) -> Entry | None:
        memory = self._memory[kind]
        if (entry := memory.get(key)) is not None:
            memory.move_to_end(key)
            return entry
        entry = None if self.root is None else self.read(kind, key, warn=warn)
        if entry is None:
            return None
        self.stats.hits[kind] += 1
        return self._remember(kind, key, entry)

    def _remember(self, kind: str, key: str, entry: Entry) -> Entry:
        if not entry.tensors or entry.nbytes > self.max_bytes:
            return entry
        # Their own memory, not a piece of a batch or of a file's content.
        entry = Entry({name: tensor.clone() for name, tensor in entry.tensors.items()}, entry.note)
        memory = self._memory[kind]
        memory[key] = entry
        self._bytes[kind] += entry.nbytes
        while self._bytes[kind] > self.max_bytes:
            self._bytes[kind] -= memory.popitem(last=False)[1].nbytes
        return entry

    @contextmanager
    def _locked(self, keys: Sequence[str], *, wait: bool) -> Iterator[list[str]]:
        """Those of `keys` that no other process is making: their locks are held. In one order, so that none waits in a circle."""
        if self.root is None:
            yield list(keys)
            return
        with ExitStack() as stack:
            held = set()
            for name in sorted({key[:_LOCK_DIGITS] for key in keys}):
                try:
                    stack.enter_context(self._lock(name).acquire(blocking=wait))
                    held.add(name)
                except Timeout:
                    continue
            yield [key for key in keys if key[:_LOCK_DIGITS] in held]

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
            if self.read(kind, key, warn=False) is None and path.exists():
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
        return FileLock(locks / key[:_LOCK_DIGITS], poll_interval=0.01)


def _serialise(entry: Entry) -> bytes:
    """Safetensors with one header key (several come in any order): 32 digits of XXH3-128 over the rest, then the note."""
    note = json.dumps(entry.note, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    whole = bytearray(save(tensors, metadata={_HEADER_KEY: _NO_CHECK.decode() + note}))
    start = whole.index(_CHECK_MARK) + len(_CHECK_MARK)
    whole[start : start + len(_NO_CHECK)] = xxhash.xxh3_128_hexdigest(whole).encode()
    return bytes(whole)


def _is_whole(raw: bytes) -> bool:
    start = raw.find(_CHECK_MARK, 0, 4096) + len(_CHECK_MARK)
    if start < len(_CHECK_MARK):
        return False
    end = start + len(_NO_CHECK)
    return bool(xxhash.xxh3_128_hexdigest(raw[:start] + _NO_CHECK + raw[end:]).encode() == raw[start:end])


def _parse(raw: bytes) -> Entry:
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    note = header["__metadata__"][_HEADER_KEY][len(_NO_CHECK) :]
    return Entry(load(raw), json.loads(note))
