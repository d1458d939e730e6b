"""The first thing that runs: signals and standard streams, before anything that takes time to import.

Ctrl-C and SIGTERM end the process at once wherever it is, in an import or in a library's callback, where an exception could be
swallowed: half-written files are removed, one line is printed, and the exit code is 130. A training handles the two signals
itself while it steps, and saves first.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

from mmdit_lora.errors import InputError

_pid = 0


def main() -> int:
    """What the command `mmdit-lora` runs; returns its exit code."""
    prepare()
    from mmdit_lora.cli.main import main as run

    return run()


def prepare() -> None:
    """Handle the signals, and open the standard streams that are closed."""
    global _pid
    if _pid == os.getpid():
        return
    _pid = os.getpid()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _stop)
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:  # closed: the next file would get its number, and what a library prints would go into that
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the whole process


class _Closed(io.TextIOBase):
    """A standard output that the caller has closed."""

    def write(self, _: str) -> int:
        raise InputError(
            "is closed, and this is written there",
            location="standard output",
            hint="redirect it to a file or /dev/null",
        )


def _stop(number: int, _: FrameType | None) -> None:
    if os.getpid() != _pid:  # a forked child: only what is its parent's could be removed
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    hints: list[str] = []
    with suppress(Exception):
        if (pool := sys.modules.get("multiprocessing")) is not None:
            for child in pool.active_children():
                child.terminate()
    with suppress(Exception):
        if (files := sys.modules.get("mmdit_lora.files")) is not None:
            hints = files.abandon()
    text = f"interrupted by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}"
    with suppress(OSError):
        cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
        os.write(2, f"{cursor}{'; '.join([text, *hints])}\n".encode())
    os._exit(130)
