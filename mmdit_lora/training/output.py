"""The output folder of a run: what is in it, and whether a run may go there."""

from __future__ import annotations

from pathlib import Path

from mmdit_lora.config import Config
from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import Checkpoint, checkpoints, remove_leftovers

CHECKPOINTS, CONFIG, REPORT = "checkpoints", "config.yaml", "report.json"
# What may differ between a run and its resumption without changing what is trained.
_FREE_ON_RESUME = {"output_dir", "tracking", "sample", "train.checkpoint_every", "train.keep_checkpoints"}
_FREE_ON_RESUME |= {"train.validate_every", "train.sample_every", "train.sample_count", "train.log_every"}


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
        if found:
            _check_same_config(found[-1], config)
    elif found or (folder / CONFIG).exists():
        raise InputError(
            "already holds a run",
            where=f"output_dir {folder}",
            cure="go on with it by `--resume latest`, or give another output_dir",
        )


def _check_same_config(checkpoint: Checkpoint, config: Config) -> None:
    before, now = checkpoint.state()["config"], config.model_dump(mode="json")
    for section, value in now.items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        for key, new in pairs:
            name = section if key is None else f"{section}.{key}"
            # A key that is younger than the checkpoint has the value that it had then: its default.
            old = before.get(section, new) if key is None else (before.get(section) or {}).get(key, new)
            if old != new and section not in _FREE_ON_RESUME and name not in _FREE_ON_RESUME:
                raise InputError(
                    f"{name} is {new!r}, and was {old!r} when the run was started",
                    where=str(checkpoint.folder),
                    cure=f"resume with {name}={old}, or start a new run in another output_dir",
                )
