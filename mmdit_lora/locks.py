"""Locks on folders that end with their process, and the identity of processes."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: the record alone decides
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True)
class Owner:
    """A process: its number, when it started (a number that no other process with that `pid` has), and on which host."""

    pid: int
    start: int
    host: str
    since: str = ""

    def is_alive(self) -> bool | None:
        """None if unknown: the process is on another host."""
        if self.host != socket.gethostname():
            return None
        return start_of(self.pid) == self.start


def start_of(pid: int) -> int | None:
    """When process `pid` of this host started, in a unit of the system; None if it does not run or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError, IndexError):
        pass
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.Error:
        return None


def this_process() -> Owner:
    """The calling process."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(os.getpid(), start_of(os.getpid()) or 0, socket.gethostname(), since)


class FolderLock:
    """A lock in the file `path` for one process at a time; reentrant in the thread that holds it.

    It is a POSIX record lock: the kernel drops it when the process ends, and children do not inherit it. The file also
    names the holder, which decides on file systems without such locks.

    Args:
        what: the folder that is written, for messages.
    """

    _mine: dict[str, FolderLock] = {}  # path -> the lock that this process holds  # noqa: RUF012

    def __init__(self, path: Path, what: Path) -> None:
        self.path, self.what = path, what
        self._handle = -1
        self._depth = 0
        self._thread = 0
        self._pid = 0

    @classmethod
    def at(cls, path: Path, what: Path) -> FolderLock:
        """The lock of this process at `path`, if it holds it, or a new one."""
        mine = cls._mine.get(str(path))
        return mine if mine is not None else cls(path, what)

    @property
    def held(self) -> bool:
        return self._depth > 0

    @property
    def is_nested(self) -> bool:
        """Whether it was held already when it was taken last."""
        return self._depth > 1

    def acquire(self) -> Owner | None:
        """Take it. Returns who held it and died, if anybody did.

        Raises:
            InputError: another process, or another thread of this one, holds it; or what has the lock's name is none, and is
                left as it is. OSError: the file cannot be written.
        """
        if self.held:
            # A forked child writes with its parent's leave.
            if self._pid == os.getpid() and self._thread != threading.get_ident():
                raise self._refusal(this_process())
            self._depth += 1
            return None
        while True:
            handle = self._open()
            try:
                self._refuse_foreign(handle)
                certain = self._try(handle)
                if not self._is_current(handle):  # its holder removed it meanwhile
                    os.close(handle)
                    continue
                before = _read(handle)
                me = this_process()
                if before is not None and (before.pid, before.start, before.host) == (me.pid, me.start, me.host):
                    before = None  # of this process, which could not remove it
                alive = None if before is None else before.is_alive()
                if before is not None and (alive or (alive is None and not certain)):
                    raise self._refusal(before)
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(vars(me)).encode(), 0)
            except BaseException as error:
                if not isinstance(error, InputError):  # a full disk: it is ours, and no use
                    with suppress(OSError):
                        self.path.unlink()
                with suppress(OSError):
                    os.close(handle)
                raise
            self._handle, self._depth, self._thread, self._pid = handle, 1, threading.get_ident(), os.getpid()
            FolderLock._mine[str(self.path)] = self
            return before

    def release(self) -> None:
        """Let it go, and remove the file."""
        self._depth -= 1
        if self._depth > 0 or self._pid != os.getpid():
            return
        self._depth = 0
        FolderLock._mine.pop(str(self.path), None)
        with suppress(OSError):
            self.path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it is gone
        with suppress(OSError):
            os.close(self._handle)

    def _open(self) -> int:
        flags = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):  # a link, folder, socket, device
                raise self._foreign() from None
            raise

    def _refuse_foreign(self, handle: int) -> None:
        """Raises `InputError`: the file is no lock. What a kill or a power cut leaves of one is empty, or zeros."""
        regular = stat.S_ISREG(os.fstat(handle).st_mode)
        if not regular or (_read(handle) is None and os.pread(handle, 4096, 0).strip(b"\0")):
            raise self._foreign()

    def _foreign(self) -> InputError:
        return InputError(
            f"has the name of the lock of {self.what}, and is none", location=str(self.path), hint="move it away"
        )

    def _try(self, handle: int) -> bool:
        """Lock an open file; whether the file system's word is to be trusted."""
        if fcntl is None:
            return False
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise self._refusal(_read(handle)) from None
            return False
        return True

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), self.path.lstat())
        except FileNotFoundError:
            return False

    def _refusal(self, owner: Owner | None) -> InputError:
        who = "another process"
        hint = "wait for it, or give another folder"
        if owner is not None:
            here = owner.host == socket.gethostname()
            who = f"process {owner.pid}{'' if here else f' on {owner.host}'}, started {owner.since},"
            if not here:
                hint += f"; if that process is gone, remove {self.path}"
        return InputError(f"is being written: {who} is at work there", location=str(self.what), hint=hint)


def _read(handle: int) -> Owner | None:
    """The holder that a lock file names."""
    try:
        record: dict[str, Any] = json.loads(os.pread(handle, 4096, 0))
        return Owner(int(record["pid"]), int(record["start"]), str(record["host"]), str(record["since"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return None
