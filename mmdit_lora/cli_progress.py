"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SHOWN = {"loss": ("loss", ".4f"), "learning_rate": ("lr", ".1e"), "grad_norm": ("|g|", ".3f")}


class ProgressLines:
    """`with ProgressLines() as tell: tell("train", 40, 300, {"loss": 0.51})`."""

    def __init__(self, *, every_seconds: float = 5.0) -> None:
        self.every_seconds = every_seconds
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._last = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if sys.stderr.isatty():
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int, scalars: dict[str, float]) -> None:
        """`phase` is at `done` of `total` (0 = a phase that does not count)."""
        note = "  ".join(f"{_SHOWN[key][0]} {scalars[key]:{_SHOWN[key][1]}}" for key in _SHOWN if key in scalars)
        if sys.stderr.isatty():
            if not total:
                return
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, note=note)
            self._bars.update(self._tasks[phase], completed=done, note=note)
            return
        now = time.perf_counter()
        first = self._started.setdefault(phase, now)
        if not total:
            print(f"{phase} ...", file=sys.stderr, flush=True)
        elif now - self._last >= self.every_seconds or done == total:
            self._last = now
            rate = f"  {done / (now - first):.1f}/s" if now - first > 1 else ""
            print(f"{phase} {done}/{total}  {note}{rate}".rstrip(), file=sys.stderr, flush=True)
