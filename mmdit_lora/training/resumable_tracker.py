"""A run's rows in a file of our own beside the tracker's, so that a killed and resumed run is one curve without a gap.

`<output_dir>/tracking.jsonl`: a first line {"tracker", "run_id"}, then each row before it is handed to the tracker, and
{"finished": true} once a tracker has written all that it was given. A line is in the system's hands when `log` returns, so it
survives SIGKILL; what the trackers hold does not. A resumed run

- goes on with the run id of the first line: the newest checkpoint may be older than the run's start, or there may be none;
- logs again, first of all, the rows up to the checkpoint that the tracker lost, or may have lost; lost ones behind it come by
  themselves;
- skips every (step, key) that was certainly logged. A resumed run makes the same draws, so that the values that stand there
  are those that it would log; only `speed/` is that of the killed start.

What is not restored: images of steps up to the checkpoint that W&B lost (their sheets are in `samples/`). What may stand
twice, with equal values: rows of an offline W&B run that had reached its file when it was killed, since nothing public tells
which did. And of a W&B run that is online, rows that were not yet sent when the machine, and not only the process, died, are
lost: nobody but the server knows of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmdit_lora.errors import InputError
from mmdit_lora.files import write_text
from mmdit_lora.json_files import read_rows
from mmdit_lora.layout import Layout
from mmdit_lora.training.tracking import Tracker

JOURNAL = "tracking.jsonl"
_FINISHED = {"finished": True}


def resumable(
    folder: Path, name: str, make: Callable[[str | None], Tracker], *, run_id: str | None, step: int, resume: bool
) -> Tracker:
    """The tracker `name`, with its journal in `folder`; in the main process only.

    Args:
        make: makes the tracker, given the id of the run to go on with, or None.
        run_id, step: of the checkpoint; None and 0 where there is none.
        resume: whether to go on with the run whose journal is in `folder`, if it is of the same tracker.
    """
    if name == "none":
        return make(None)
    path = folder / JOURNAL
    header, rows = _read(path) if resume else (None, [])
    if header is not None and header["tracker"] == name:
        run_id = header["run_id"]
    elif header is not None:
        run_id, rows = None, []  # the checkpoint's id is of the other tracker
    return ResumableTracker(make(run_id), path, name, rows, step)


class ResumableTracker(Tracker):
    """A tracker whose rows are in a journal first.

    Args:
        tracker: to hand them to.
        path: of the journal; is written anew, with what is in it already.
        name: of the tracker, for the first line.
        rows: of earlier starts. step: of the checkpoint.
    """

    def __init__(self, tracker: Tracker, path: Path, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self.tracker = tracker
        safe = tracker.logged()
        last = max((number for number, row in enumerate(rows) if row == _FINISHED), default=0)
        safe = {pair for row in (rows if safe is None else rows[:last]) for pair in _pairs(row)} | (safe or set())
        # What is lost and will be done again is logged when it is done, so that steps go up.
        known = {pair for row in rows for pair in _pairs(row) if pair[0] <= step or pair in safe}
        rows = [row for row in rows if row == _FINISHED or any(pair in known for pair in _pairs(row))]
        lines = [{"tracker": name, "run_id": tracker.run_id}, *rows]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))  # without half a line that a kill left
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._done = known | safe
        for row in rows:
            lost = {name: value for name, value in row.get("scalars", {}).items() if (row["step"], name) not in safe}
            if lost and row["step"] <= step:
                tracker.log(row["step"], lost)

    @property
    def run_id(self) -> str | None:
        return self.tracker.run_id

    @property
    def location(self) -> str | None:
        return self.tracker.location

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        new = {key: float(value) for key, value in scalars.items() if (step, key) not in self._done}
        if new:
            self._done |= {(step, key) for key in new}
            self._file.write(json.dumps({"step": step, "scalars": new}) + "\n")
            self.tracker.log(step, new)

    def log_images(self, step: int, key: str, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
        # W&B has a list for each size, TensorBoard a tag for each image.
        if any(at == step and (k == key or k.startswith((f"{key}_", f"{key}/"))) for at, k in self._done):
            return
        self._done.add((step, key))
        self._file.write(json.dumps({"step": step, "images": key}) + "\n")
        self.tracker.log_images(step, key, images, layouts)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.tracker.summary(values)

    def artifact(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        self.tracker.artifact(folder, metadata)

    def logged(self) -> set[tuple[int, str]] | None:
        return set(self._done)

    def finish(self, *, failed: bool = False) -> None:
        self.tracker.finish(failed=failed)
        self._file.write(json.dumps(_FINISHED) + "\n")
        self._file.close()


def _pairs(row: Mapping[str, Any]) -> list[tuple[int, str]]:
    return [(row["step"], key) for key in ([row["images"]] if "images" in row else row.get("scalars", ()))]


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """First line, or None, and rows. Raises `InputError` for a file that was not written so."""
    hint = "move it away: the run goes on without its earlier rows"
    lines = read_rows(path, what="journal of a run", hint=hint)
    for number, line in enumerate(lines, start=1):
        kinds: dict[str, Any] = {"step": int} if number > 1 else {"tracker": str, "run_id": str | None}
        right = all(key in line and isinstance(line[key], kind) for key, kind in kinds.items())
        right = right and (number == 1 or isinstance(line.get("scalars", line.get("images")), dict | str))
        if not right and (number == 1 or line != _FINISHED):
            raise InputError("is no row of a run's journal", location=f"{path}:{number}", hint=hint)
    return (lines[0], lines[1:]) if lines else (None, [])
