"""The output folder of a run: what is in it, and whether a run may go there."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmdit_lora.config import Config
from mmdit_lora.config_filter import nested
from mmdit_lora.errors import InputError
from mmdit_lora.files import remove_temporaries
from mmdit_lora.training.checkpoint import Checkpoint, checkpoints, remove_leftovers
from mmdit_lora.training.identity import PLACES, knows_places

CHECKPOINTS, CONFIG, REPORT, SAMPLES = "checkpoints", "config.yaml", "report.json", "samples"
_WRITTEN = (CONFIG, REPORT, "adapter", "base")  # of what a kill may leave a half-written neighbour
# What may differ between a run and its resumption without changing what is trained.
_FREE_ON_RESUME = {
    "data.workers",
    "output_dir",
    "tracking",
    "sample",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.sample_every",
    "train.sample_count",
    "train.log_every",
    "train.final",
    "train.early_stop",
    # A longer (or shorter) run goes on under the schedule of its new length, at the step reached: a learning rate is a
    # function of (step, max_steps).
    "train.max_steps",
    # The samples of a step over all processes are compared instead: a run may go on with another number of them.
    "train.batch_size",
    "train.gradient_accumulation",
    "prior.batch_size",
    "train.preflight",
}


def check_output(folder: Path, config: Config, resume: bool) -> None:
    """Before a run: its folder is free, or holds what it goes on with.

    Raises:
        InputError: it holds another run, or one of another config.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file", where=f"output_dir {folder}", cure="give a folder")
    found = checkpoints(folder / CHECKPOINTS)
    if resume:
        remove_leftovers(folder / CHECKPOINTS)
        for name in _WRITTEN:
            remove_temporaries(folder / name)
        if found:
            _check_same_config(found[-1], config)
    elif found or (folder / CONFIG).exists():
        raise InputError(
            "already holds a run",
            where=f"output_dir {folder}",
            cure="go on with it by `--resume latest`, or give another output_dir",
        )


def _check_same_config(checkpoint: Checkpoint, config: Config) -> None:
    state = checkpoint.state()
    saved = state["config"]
    if checkpoint.step > config.train.max_steps:
        raise InputError(
            f"is {config.train.max_steps:,}, and the run is at step {checkpoint.step:,} already",
            where="train.max_steps",
            cure=f"give {checkpoint.step:,} or more, or start a new run in another output_dir",
        )
    # Keys that are younger than the checkpoint had their defaults. A config of which this version makes nothing is compared
    # as it stands.
    with suppress(ValueError):
        saved = Config.model_validate(saved).model_dump(mode="json")
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    # Where things lie may change: what they are is compared when they have been read.
    free = _FREE_ON_RESUME | (set(PLACES) if knows_places(state["fingerprints"]) else set())
    for name, new in now.items():
        old = before.get(name, _ABSENT)
        if old is _ABSENT:  # of a file that this version makes nothing of
            continue
        if old != new and name not in free and name.split(".")[0] not in free:
            override = shlex.quote(f"{name}={json.dumps(old, ensure_ascii=False)}")
            raise InputError(
                f"{name} is {new!r}, and was {old!r} when the run was started",
                where=str(checkpoint.folder),
                cure=f"resume with {override}, or start a new run in another output_dir",
            )


def _flat(config: dict[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """{"data.filter.min_area": 0.0, ...}; a mapping that is a value, and no section, stays whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        keys = (*above, key)
        flat |= _flat(value, keys) if nested(Config, keys) is not None else {".".join(keys): value}
    return flat


_ABSENT = object()
