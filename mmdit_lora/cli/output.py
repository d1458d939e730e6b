"""What every verb prints: messages and progress on stderr, one JSON object on stdout.

Progress is a bar on a terminal and a line every few seconds elsewhere; both show the time that is left.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from mmdit_lora.errors import clip
from mmdit_lora.files import json_text

# Scalars that are shown if a phase reports them, in this order.
_SHOWN = {
    "loss": "loss {:.4f}",
    "samples_per_s": "{:.3g} samples/s",
    "memory_gb": "{:.3g} GB",
    "share_data": "data {:.0%}",
    "share_other": "other {:.0%}",
    "tflops": "{:.3g} TFLOP/s",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "|g| {:.3g}",
}
_FIGURES = ("miou", "iou50", "color_acc", "shape_acc", "ap", "relations", "clip_box")
_RECENT = 20  # intervals that the time of a step is taken from


class ProgressLines:
    """`with ProgressLines() as progress: progress("train", 40, 300, {"loss": 0.51})`.

    Args:
        every_seconds: between lines, if stderr is not a terminal.
        pauses: name -> every so many steps the phase "train" stops for something else (validation, images).
    """

    def __init__(self, *, every_seconds: float = 5.0, pauses: Mapping[str, int] | None = None) -> None:
        self.every_seconds, self.pauses = every_seconds, pauses or {}
        self.on_terminal = sys.stderr.isatty()
        self._bars = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._left: dict[str, TimeLeft] = {}
        self._last = 0.0

    def __enter__(self) -> Self:
        if self.on_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on_terminal:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int, scalars: Mapping[str, float]) -> None:
        """`phase` is at `done` of `total` (0 = a phase that does not count)."""
        now = time.perf_counter()
        if phase not in self._left or self._left[phase].total != total:  # announced before it could be counted
            self._left[phase] = TimeLeft(total, self.pauses if phase == "train" else {})
        left = self._left[phase].at(done, now)
        left_text = "" if left is None else f"{clock(left)} left" if done < total else f"{clock(left)} in all"
        note = [text.format(scalars[key]) for key, text in _SHOWN.items() if key in scalars]
        if scalars.get("tflops", 1.0) < 0.1:  # a small model on a CPU
            note = [f"{1000 * scalars['tflops']:.2g} GFLOP/s" if "TFLOP" in text else text for text in note]
        if self.on_terminal:
            if not total:
                return
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, note=note, left=left_text)
            self._bars.update(self._tasks[phase], completed=done, note=note, left=left_text)
        elif not total:
            print(f"{phase} ...", file=sys.stderr, flush=True)
        elif now - self._last >= self.every_seconds or done == total:
            self._last = now
            rate = self._left[phase].rate
            if rate is not None and "samples_per_s" not in scalars:
                note.append(f"{rate:.3g}/s")
            cells = [f"{phase} {done}/{total}", left_text, *note]
            print("  ".join(cell for cell in cells if cell), file=sys.stderr, flush=True)


class TimeLeft:
    """The time that a phase still takes, from the steps so far and the pauses to come.

    Steps and pauses are timed apart: a plain mean is far off around a pause that takes as long as a hundred steps.

    Args:
        total: steps of the phase.
        pauses: name -> every so many steps, after the step; 0 = never.
    """

    def __init__(self, total: int, pauses: Mapping[str, int]) -> None:
        self.total = total
        self._pauses = {name: every for name, every in pauses.items() if every}
        self._steps: list[tuple[int, float]] = []  # newest intervals without a pause: steps, seconds
        self._paused: dict[frozenset[str], list[float]] = {}
        self._first: tuple[int, float] | None = None
        self._before: tuple[int, float] | None = None

    def at(self, done: int, now: float) -> float | None:
        """Seconds left at `done` steps; None if nothing is known yet. At the end: the seconds that all steps took.

        Args:
            now: seconds of any clock that goes on.
        """
        if self._first is None or self._before is None:
            self._first = self._before = done, now
            return None
        self._see(done - self._before[0], now - self._before[1], self._due(self._before[0], done))
        self._before = done, now
        if done >= self.total:
            return now - self._first[1]
        each = self._step_seconds()
        if each is None:
            return None
        # A pause comes after its step: that of `done` itself is still to come.
        pauses = sum(self._pause_seconds(kind) for kind in self._due(done, self.total))
        return (self.total - done) * each + pauses

    @property
    def rate(self) -> float | None:
        """Steps a second without pauses; None if nothing is known yet."""
        each = self._step_seconds()
        return 1 / each if each else None

    def _see(self, steps: int, seconds: float, pauses: list[frozenset[str]]) -> None:
        if steps <= 0:
            return
        each = self._step_seconds()
        if not pauses:
            self._steps = [*self._steps[1 - _RECENT :], (steps, seconds)]
        elif each is not None:
            for kind in pauses:
                self._paused.setdefault(kind, []).append(max(seconds - steps * each, 0.0) / len(pauses))
        elif not self._steps and not self._paused:
            # Each interval has a pause: its mean is all there is.
            self._pauses = {}
            self._steps = [(steps, seconds)]

    def _due(self, start: int, end: int) -> list[frozenset[str]]:
        """What the phase stops for after the steps `start` to `end` - 1, each with its kind."""
        names: dict[int, set[str]] = {}
        for name, every in self._pauses.items():
            for step in range(max(-(-start // every) * every, every), end, every):
                names.setdefault(step, set()).add(name)
        return [frozenset(kind) for kind in names.values()]

    def _step_seconds(self) -> float | None:
        steps = sum(count for count, _ in self._steps)
        return sum(seconds for _, seconds in self._steps) / steps if steps else None

    def _pause_seconds(self, kind: frozenset[str]) -> float:
        seen = self._paused.get(kind)
        if seen is None:  # what is known of the others, or nothing
            seen = [seconds for several in self._paused.values() for seconds in several] or [0.0]
        return sum(seen) / len(seen)


class _TwoLines(Progress):
    """A bar over the whole width, and below it as many of its figures as fit."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            if task.visible:
                yield self.make_tasks_table([task])
        note: list[str] = self.tasks[-1].fields["note"] if self.tasks else []
        while note and len("  ".join(note)) > self.console.width - 2:
            note = note[:-1]
        if note:
            yield Text("  " + "  ".join(note), style="dim", no_wrap=True)


def clock(seconds: float) -> str:
    """E.g. "0:42", "12:05", "3:20:00", "2 d 4:00:00"."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def say(message: str) -> None:
    """Print lines for people on stderr; stdout is for results. Each is clipped, as it may echo the content of a file."""
    lines = "\n".join(clip(line, 1000) for line in message.split("\n"))
    with suppress(OSError):  # a closed stderr does not end the work
        Console(stderr=True, soft_wrap=True).print(lines, markup=False, highlight=False, emoji=False)


def emit(data: Mapping[str, Any]) -> None:
    """The one JSON object of `--json`."""
    text = json_text(data)
    if (sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8"):
        text = json.dumps(data)
    sys.stdout.write(text + "\n")


def fidelity_table(report: dict[str, Any], title: str) -> str:
    """The chief figures of the sides that `report` has, as lines for a terminal."""
    sides = [key for key, side in report.items() if isinstance(side, dict) and "miou" in side]
    names = [name for name in _FIGURES if any(name in report[side] for side in sides)]
    rows = [f"{title:<40}" + "".join(f"{name:>11}" for name in names)]
    for side in sides:
        cells = (f"{report[side][name]:>11.3f}" if name in report[side] else f"{'-':>11}" for name in names)
        rows.append(f"  {side.replace('_', ' '):<38}" + "".join(cells))
    return "\n".join(rows)
