"""The output folder of a run: what is in it, and whether a run may go there."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from mmdit_lora.config.loading import Config
from mmdit_lora.config.schema import nested
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import output_path
from mmdit_lora.outputs import check_new_folder, check_open_folder, open_folder
from mmdit_lora.training.checkpoint import Checkpoint, checkpoints
from mmdit_lora.training.fingerprints import PLACES, knows_places

CHECKPOINTS, CONFIG, REPORT, SAMPLES = "checkpoints", "config.yaml", "report.json", "samples"
VERB = "train"
WRITTEN: tuple[str, ...] = (CONFIG, REPORT, "adapter/", "base/", f"{CHECKPOINTS}/", f"{SAMPLES}/", "prior/")
WRITTEN += ("tracking.jsonl", "tensorboard/", "wandb/")
_OTHERS = ("quickstart",)  # verbs whose folder is a run's too
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")  # as launchers tell a process its number
# What may differ between a run and its resumption without changing what is trained.
# A longer (or shorter) run goes on under the schedule of its new length, at the step reached: a learning rate is a function of
# (step, max_steps). Of the batch's parts, their product is compared: a run may go on with another number of processes.
_FREE_ON_RESUME = {"output_dir", "tracking", "sample", "data.workers", "prior.batch_size"}
_FREE_ON_RESUME |= {
    f"train.{key}" for key in ("max_steps", "batch_size", "gradient_accumulation", "preflight", "final")
}
_FREE_ON_RESUME |= {
    f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "validate_every", "sample_every")
}
_FREE_ON_RESUME |= {f"train.{key}" for key in ("sample_count", "log_every", "early_stop")}


def check_output(folder: Path, config: Config, resume: bool) -> None:
    """Before a run: its folder is free, or holds what it goes on with.

    Raises:
        InputError: it holds another run, or one of another config.
    """
    if not _is_main():
        return  # the main process may have begun to write
    folder = output_path(folder, folder=True)
    found = checkpoints(folder / CHECKPOINTS)
    check_open_folder(folder, names=WRITTEN, **_rules(config, resume))
    for name in ("adapter", "base"):
        check_new_folder(folder / name, verb=VERB)
    if resume:
        if found:
            _check_same_config(found[-1], config)
    elif found or (folder / CONFIG).exists():
        raise InputError(
            "already holds a run",
            location=f"output_dir {folder}",
            hint="go on with it by `--resume latest`, or give another output_dir",
        )


@contextmanager
def run_folder(config: Config, *, resume: bool) -> Iterator[None]:
    """Within it, the run's folder is this run's: nobody else writes there, and what a killed start left is put right.

    Of several processes, the main one sees to that.

    Raises:
        InputError: see `check_output`, `open_folder`.
    """
    folder = Path(config.output_dir)
    check_output(folder, config, resume)
    if not _is_main():
        yield
        return
    logs, again = ["tracking.jsonl"], "`--resume latest`"
    with open_folder(folder, names=WRITTEN, logs=logs, again=again, **_rules(config, resume)):
        yield


def _rules(config: Config, resume: bool) -> dict[str, Any]:
    # A run of an earlier version has checkpoints, and no marker.
    adopt = resume and bool(checkpoints(Path(config.output_dir) / CHECKPOINTS))
    inputs = {key: attrgetter(key)(config) for key in PLACES}
    return {"verb": VERB, "others": _OTHERS, "inputs": inputs, "adopt": adopt}


def _is_main() -> bool:
    """Whether this is the process that writes, before Accelerate is set up."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def _check_same_config(checkpoint: Checkpoint, config: Config) -> None:
    state = checkpoint.state()
    if checkpoint.step > config.train.max_steps:
        raise InputError(
            f"is {config.train.max_steps:,}, and the run is at step {checkpoint.step:,} already",
            location="train.max_steps",
            hint=f"give {checkpoint.step:,} or more, or start a new run in another output_dir",
        )
    saved = state["config"]
    # Keys that are younger than the checkpoint had their defaults. A config of which this version makes nothing is compared
    # as it stands.
    with suppress(ValueError):
        saved = Config.model_validate(saved).model_dump(mode="json")
    before = _flat(saved)
    # Where things lie may change: what they are is compared when they have been read.
    free = _FREE_ON_RESUME | (set(PLACES) if knows_places(state["fingerprints"]) else set())
    for name, new in _flat(config.model_dump(mode="json")).items():
        if name not in before or before[name] == new or name in free or name.split(".")[0] in free:
            continue
        override = shlex.quote(f"{name}={json.dumps(before[name], ensure_ascii=False)}")
        raise InputError(
            f"{name} is {shown(new)}, and was {shown(before[name])} when the run was started",
            location=str(checkpoint.folder),
            hint=f"resume with {override}, or start a new run in another output_dir",
        )


def _flat(config: dict[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """{"data.filter.min_area": 0.0, ...}; a mapping that is a value, and no section, stays whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        keys = (*above, key)
        flat |= _flat(value, keys) if nested(Config, keys) is not None else {".".join(keys): value}
    return flat
