"""Read back what W&B wrote offline, from the bytes of the run file (`mmdit_lora/training/tracking.py`): for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit_lora.training.tracking import records


@dataclass
class OfflineRun:
    """One run folder.

    Args:
        run_id: the id in the run's record.
        project: likewise.
        history: one dict for each `run.log`, in order, with W&B's own keys (`_step`, ...) left out.
        summary: the last value of each key set by hand or by logging.
        config: the config, nested; `_wandb` left out.
        files: the folder under which media paths lie.
        exit_code: None if the run never finished.
    """

    run_id: str = ""
    project: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: Path = Path()
    exit_code: int | None = None

    def series(self, key: str) -> dict[int, float]:
        """step -> value of a scalar; the last one where a step was logged twice."""
        return {row["step"]: row[key] for row in self.history if key in row}

    def images(self, key: str) -> dict[int, list[dict[str, Any]]]:
        """step -> images logged under `key`, each {"path", "caption", "boxes"}; boxes as W&B's box JSON holds them."""
        return {row["step"]: list(self._images(row[key])) for row in self.history if key in row}

    def _images(self, value: dict[str, Any]) -> Iterator[dict[str, Any]]:
        assert value["_type"] == "images/separated", value["_type"]
        captions = value.get("captions") or [None] * value["count"]
        boxes = value.get("all_boxes") or [None] * value["count"]
        for name, caption, groups in zip(value["filenames"], captions, boxes, strict=True):
            listed = json.loads((self.files / groups["layout"]["path"]).read_text())["box_data"] if groups else []
            yield {"path": self.files / name, "caption": caption, "boxes": listed}


def read_offline_run(folder: str | Path) -> OfflineRun:
    """The one offline run under `folder` (a folder that was given to `wandb.init(dir=...)`, or the run's own).

    Raises:
        AssertionError: there is not exactly one run, or its file is damaged.
    """
    runs = read_offline_runs(folder)
    assert len(runs) == 1, f"{len(runs)} offline runs under {folder}"
    return runs[0]


def read_offline_runs(folder: str | Path) -> list[OfflineRun]:
    """All offline runs under `folder`, the oldest first: a resumed run has one for each start, all of one id."""
    # The folder's time has whole seconds; the file's own breaks the tie.
    paths = sorted(Path(folder).rglob("run-*.wandb"), key=lambda path: (path.parent.name[:27], path.stat().st_mtime_ns))
    return [_read(path) for path in paths if not path.parent.is_symlink()]


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun(files=path.parent / "files")
    for data in records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            row = {key: value for key, value in row.items() if not key.startswith("_")}
            if row:
                run.history.append(row)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    run.config.pop("_wandb", None)
    return run


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        place, keys = target, list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
