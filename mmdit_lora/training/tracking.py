"""Trackers: W&B, TensorBoard or none, behind one interface.

Only the main process makes a tracker; the others have a `NullTracker`. wandb and tensorboard are imported when a tracker is
made, never before.

Not `accelerate.tracking`, of which every method would be overridden (read in 1.15): its W&B tracker passes W&B's own step,
which only goes up, so that rows of a step done again after a resume are dropped in silence; its TensorBoard tracker takes no
nested config and writes one event folder a start; neither draws boxes, goes on with a run or marks one as failed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.visual import draw_boxes, phrase_colors

logger = logging.getLogger(__name__)

TrackerName = Literal["wandb", "tensorboard", "none"]
TRACKERS: tuple[str, ...] = ("wandb", "tensorboard", "none")
WANDB_MODES: tuple[str, ...] = ("online", "offline", "disabled")


class Tracker:
    """What a trainer reports. Steps are optimizer steps; they may be logged again after a resume. This one keeps nothing."""

    @property
    def run_id(self) -> str | None:
        """What `make_tracker(run_id=...)` needs to go on with this run; goes into the checkpoint. None: nothing to go on with."""
        return None

    @property
    def location(self) -> str | None:
        """A web address or a folder."""
        return None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars of `step`; NaN and infinite values are logged as they are."""

    def log_images(self, step: int, key: str, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
        """Images of `step`, with the boxes and phrases of their layouts.

        Raises:
            ValueError: there are not as many layouts as images.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Numbers and short texts that describe the whole run, e.g. the best fidelity."""

    def artifact(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """The adapter's folder, with its card; only W&B keeps it."""

    def logged(self) -> set[tuple[int, str]] | None:
        """(step, key) of all that earlier starts of this run certainly left; None: it has all that it was given.

        To be asked before anything is logged.
        """
        return None

    def finish(self, *, failed: bool = False) -> None:
        """Write out everything and close. `failed` marks the run as crashed where the tracker knows such a mark."""


class NullTracker(Tracker):
    """Keeps nothing."""


class WandbTracker(Tracker):
    """Weights & Biases, in `folder`/wandb. Offline it needs neither account nor network: `wandb sync FOLDER` uploads it later.

    For its arguments see `make_tracker`. Offline every start writes its own folder under the same id; `wandb sync` joins them.
    """

    def __init__(
        self,
        *,
        project: str,
        run_name: str | None,
        mode: str | None,
        folder: str | Path,
        run_id: str | None,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        self._wandb = wandb
        mode = _wandb_mode(mode)
        # wandb silently goes to a temporary folder when it cannot write to the given one
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Without console="off" wandb replaces sys.stdout, which breaks progress bars and `--json`.
        settings = wandb.Settings(silent=True, console="off", save_code=False)
        try:
            self._run = wandb.init(
                project=project,
                name=run_name,
                mode=mode,  # type: ignore[arg-type]
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=_plain(config),
                allow_val_change=True,  # a run may go on with more steps than it was started for
                settings=settings,
            )
        except wandb.errors.Error as error:
            hint = "set the tracker's mode to offline and upload later with `wandb sync`"
            raise InputError(f"W&B did not start: {error}", location="tracker", hint=hint) from error
        # W&B's own step only goes up, so that after a resume rows of a step that was logged already would be dropped in silence.
        # Each call below is therefore a row of its own, and `step`, a column of it, is the axis of all the others.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._classes: dict[str, int] = {}
        logger.info("W&B run: %s", self.location)

    @property
    def run_id(self) -> str | None:
        return str(self._run.id)

    @property
    def location(self) -> str | None:
        if self._run.disabled:
            return None
        return str(self._run.settings.sync_dir) if self._run.offline else self._run.url

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{key: float(value) for key, value in scalars.items()}})

    def log_images(self, step: int, key: str, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
        _check_pairs(images, layouts)
        # One id a phrase for the whole run, so that a phrase keeps its colour. All images of a key share one table of
        # names (the last one logged wins), so each is given all of them.
        for layout in layouts:
            for box in layout.boxes:
                self._classes.setdefault(box.phrase, len(self._classes))
        # W&B shows a list of images of different sizes wrongly: one list for each size.
        by_size: dict[tuple[int, int], list[Any]] = {}
        for image, layout in zip(images, layouts, strict=True):
            by_size.setdefault(image.size, []).append(self._image(image.convert("RGB"), layout))
        row: dict[str, Any] = {"step": step}
        for (width, height), listed in by_size.items():
            row[key if len(by_size) == 1 else f"{key}_{width}x{height}"] = listed
        if images:
            self._run.log(row)

    def _image(self, image: Image.Image, layout: Layout) -> Any:
        names = {number: phrase for phrase, number in self._classes.items()}
        data = [
            {
                "position": {"minX": box.xyxy[0], "minY": box.xyxy[1], "maxX": box.xyxy[2], "maxY": box.xyxy[3]},
                "class_id": self._classes[box.phrase],
                "box_caption": box.phrase,
            }
            for box in layout.boxes
        ]
        boxes: Any = {"layout": {"box_data": data, "class_labels": names}} if data else None
        return self._wandb.Image(image, boxes=boxes, caption=layout.caption)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(_plain(values))

    def artifact(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        if self._run.disabled:
            return
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=_plain(metadata))
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def logged(self) -> set[tuple[int, str]] | None:
        # Of an offline start that is killed, the last rows are lost: W&B writes whole blocks of 32 KiB (seen, 0.31: 91 of 200
        # rows, although the last was logged 5 s before). No public call tells which.
        return set() if self._run.offline and not self._run.disabled else None

    def finish(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)
        # Offline, `finish` returns before the run file is on the disk (seen, 0.31.0); only the end of wandb's own process is
        # waited for. Not while a run of somebody else's goes on in it.
        if self._run.offline and self._wandb.run is None:
            self._wandb.teardown()


class TensorBoardTracker(Tracker):
    """TensorBoard event files in `folder`/tensorboard/<run id>; the boxes are drawn on the images.

    Args:
        run_name: the run id; a number is appended where a run of that name exists already.
        run_id: goes on with that run: what was logged before at or after the first step logged now is hidden.

    Raises:
        InputError: the tensorboard package is not installed.
    """

    def __init__(
        self, *, folder: str | Path, run_name: str | None, run_id: str | None = None, config: Mapping[str, Any]
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            hint = "uv pip install mmdit-lora[tensorboard]  (or choose the tracker wandb or none)"
            raise InputError("the tensorboard package is not installed", location="tracker", hint=hint) from error

        self._make_writer = SummaryWriter
        root = Path(folder) / "tensorboard"
        name = run_id or run_name or "run"
        number = 1
        while run_id is None and (root / name).exists():
            number += 1
            name = f"{run_name or 'run'}-{number}"
        self._folder, self._run_id, self._config = root / name, name, config
        self._writer: Any = None
        self._purges = True
        self._folder.mkdir(parents=True, exist_ok=True)  # takes the name, before anything is logged
        logger.info("TensorBoard run: %s", self._folder)

    @property
    def run_id(self) -> str | None:
        return self._run_id

    @property
    def location(self) -> str | None:
        return str(self._folder)

    def _open(self, step: int | None) -> Any:
        """The writer, made at the first use: from the first step on, steps of an earlier start are obsolete."""
        if self._writer is None:
            going_on = any(self._folder.iterdir())
            self._writer = self._make_writer(
                log_dir=str(self._folder), purge_step=step if going_on and self._purges else None
            )
            self._writer.add_text("config", _as_code(self._config), global_step=step)
        return self._writer

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        writer = self._open(step)
        for key, value in scalars.items():
            writer.add_scalar(key, float(value), global_step=step)
        writer.flush()  # a killed run keeps what it logged

    def log_images(self, step: int, key: str, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
        _check_pairs(images, layouts)
        import numpy as np

        colors = phrase_colors(layouts)
        for index, (image, layout) in enumerate(zip(images, layouts, strict=True)):
            drawn = np.asarray(draw_boxes(image, layout, colors=colors))
            self._open(step).add_image(f"{key}/{index}", drawn, global_step=step, dataformats="HWC")
        if images:
            self._writer.flush()

    def logged(self) -> set[tuple[int, str]] | None:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        self._purges = False
        files = sorted(self._folder.glob("events.out.tfevents.*"))
        return {
            (event.step, value.tag)
            for file in files
            for event in EventFileLoader(str(file)).Load()
            for value in event.summary.value
        }

    def summary(self, values: Mapping[str, Any]) -> None:
        self._open(None).add_text("summary", _as_code(values))

    def finish(self, *, failed: bool = False) -> None:  # noqa: ARG002 - event files have no mark for it
        if self._writer is not None:
            self._writer.close()


def make_tracker(
    tracker: TrackerName | str,
    *,
    project: str,
    run_name: str | None,
    mode: str | None,
    folder: str | Path,
    run_id: str | None = None,
    config: Mapping[str, Any],
) -> Tracker:
    """The tracker of that name. Call it in the main process only.

    Args:
        tracker: "wandb", "tensorboard" or "none".
        project: W&B project; the others have none.
        run_name: shown name of the run.
        mode: of W&B: "online", "offline", "disabled"; None: WANDB_MODE, else online with an API key, else offline.
        folder: the output folder of the training; W&B writes to its wandb/, TensorBoard to its tensorboard/.
        run_id: `Tracker.run_id` of the run to go on with.
        config: of the run; paths, enums and the like are turned into texts.

    Raises:
        InputError: the name or the mode is unknown, a package is missing, or W&B cannot be reached.
    """
    if tracker == "none":
        return NullTracker()
    if tracker == "tensorboard":
        return TensorBoardTracker(folder=folder, run_name=run_name, run_id=run_id, config=config)
    if tracker == "wandb":
        return WandbTracker(project=project, run_name=run_name, mode=mode, folder=folder, run_id=run_id, config=config)
    raise InputError(f"unknown tracker {tracker!r}", location="tracker", hint=f"choose one of {', '.join(TRACKERS)}")


def _plain(values: Mapping[str, Any]) -> Any:
    """What JSON does not know becomes text."""
    return json.loads(json.dumps(values, default=str))


def _wandb_mode(mode: str | None) -> str:
    import wandb

    mode = mode or os.environ.get("WANDB_MODE") or None
    if mode is not None and mode not in WANDB_MODES:
        hint = f"choose one of {', '.join(WANDB_MODES)}"
        raise InputError(f"unknown W&B mode {mode!r}", location="tracker", hint=hint)
    if mode in ("offline", "disabled"):
        return mode
    # Never ask for a key: a training run in the background would wait for the answer for ever.
    known = wandb.login(prompt=False, verify=False)
    if mode == "online" and not known:
        hint = "run `wandb login`, set WANDB_API_KEY, or set the tracker's mode to offline"
        raise InputError("W&B is to be online, but there is no API key", location="tracker", hint=hint)
    return "online" if known else "offline"


def _check_pairs(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
    if len(images) != len(layouts):
        raise ValueError(f"{len(images)} images but {len(layouts)} layouts")


def _as_code(values: Mapping[str, Any]) -> str:
    """As a Markdown code block, which TensorBoard's text panel renders."""
    text = json.dumps(_plain(values), indent=2, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.splitlines())
